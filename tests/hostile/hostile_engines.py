"""Engine directories with one damaged place, by number.

A case copies a good directory and damages a value of its manifest, the bytes of a file, its ONNX
graph, its tokenizer, or an entry of the file system. Where a case says so, the hashes in the
manifest are made to agree with the damaged file.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

__all__ = ["DECODER", "DENOISER", "Case", "external_weights"]

DENOISER = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, latent_height, latent_width] sample, float[1] timestep,
   float[batch, 8, 2] encoder_hidden_states)
  => (float[batch, 4, latent_height, latent_width] out_sample)
<float half = {0.5}, float[4, 4, 1, 1] weight = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
{
  mean = ReduceMean<axes = [1, 2], keepdims = 1>(encoder_hidden_states)
  axis = Constant<value = int64[1] {3}>()
  bias = Unsqueeze(mean, axis)
  mixed = Conv<kernel_shape = [1, 1], pads = [0, 0, 0, 0]>(sample, weight)
  scaled = Mul(mixed, half)
  step = Mul(timestep, half)
  bounded = Tanh(step)
  moved = Add(scaled, bias)
  out_sample = Mul(moved, bounded)
}"""
DECODER = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, latent_height, latent_width] latent_sample)
  => (float[batch, 3, height, width] sample)
<float[3, 4, 1, 1] weight = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0},
 float[4] scales = {1, 1, 8, 8}>
{
  mixed = Conv<kernel_shape = [1, 1]>(latent_sample, weight)
  large = Resize<mode = "nearest">(mixed, , scales)
  sample = Tanh(large)
}"""

_BIG = 2**63
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 3.5, 255, 99_999, 10**6, 2**31, 2**32, _BIG, -_BIG, 10**30),
    *(1e-30, 1e308, -0.0, "", "a", "0", "/etc/passwd", "../../evil", "/some/where/x", "C:x", "nul"),
    *("\x1b[31m", "\x00", "a\nb", "\u202e", "\x9b", "x" * 5000, "é", "denoiser", "vae_decoder"),
    *("batch", "batch*999999", "h//3", "latent_height", "float16", "int8", "onnxruntime", "null"),
    *("openvino", "tensorrt", "onnxruntime-cuda", "ddim", "pndm", "euler", "heun", "lcm", "unipc"),
    *(
        "leading",
        "trailing",
        "linspace",
        "sigmoid",
        "laplace",
        "explicit",
        "karras",
        "v_prediction",
    ),
    *([], {}, [None], [[]], {"a": 1}, [1, 1, 1], [9, 1, 1], [1, 1, _BIG], ["a"] * 1000, {"": {}}),
)
TEXTS: tuple[str, ...] = (
    *("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', '"\\u0000"', "[" * 5000),
    *(
        "[" * 100_000 + "]" * 100_000,
        "{" * 500,
        "'a'",
        "0x1",
        "01",
        "",
        "//",
        '{"a":1,"a":2}',
        "1e",
    ),
)
"""JSON texts that json.dumps would not write."""

_MARK = "@here@"


@dataclass(frozen=True)
class Case:
    """Case of a number: a good directory, and the way in which its copy is damaged."""

    index: int
    bases: Sequence[Path]

    def make(self, directory: Path) -> str:
        """Write the damaged directory, and return what was damaged."""
        numbers = random.Random(self.index)
        base = self.bases[self.index % len(self.bases)]
        shutil.copytree(base, directory)
        damage = numbers.choices(list(_DAMAGES), list(_DAMAGES.values()))[0]
        return f"{base.name}: {damage(directory, numbers)}"


def external_weights(path: Path) -> None:
    """Move the weights of a graph to a file beside it."""
    model = ir.load(path)
    model.graph.name = "external"
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=8)
    assert path.with_name(f"{path.name}.data").stat().st_size


# The manifest


def _content(directory: Path) -> Any:
    return json.loads((directory / "manifest.json").read_bytes())


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON tree."""
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _above(tree: Any, path: Sequence[Any]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _write(directory: Path, text: str) -> None:
    path = directory / "manifest.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _replace_value(directory: Path, numbers: random.Random) -> str:
    tree = _content(directory)
    path = numbers.choice(list(_places(tree)))
    value = numbers.choice(VALUES)
    if numbers.random() < 0.2:  # a value of another place
        other = numbers.choice(list(_places(tree)))
        value = json.loads(json.dumps(_above(tree, (*other, ""))))
    _above(tree, path)[path[-1]] = value
    _write(directory, json.dumps(tree))
    return f"{path} is {value!r:.60}"


def _replace_text(directory: Path, numbers: random.Random) -> str:
    tree = _content(directory)
    path = numbers.choice(list(_places(tree)))
    _above(tree, path)[path[-1]] = _MARK
    text = numbers.choice(TEXTS)
    _write(directory, json.dumps(tree).replace(f'"{_MARK}"', text))
    return f"{path} is the text {text:.30}"


def _change_keys(directory: Path, numbers: random.Random) -> str:
    tree = _content(directory)
    path = numbers.choice(list(_places(tree)))
    above, key = _above(tree, path), path[-1]
    if numbers.random() < 0.5:
        del above[key]
        how = "is gone"
    elif isinstance(above, dict):
        new = str(numbers.choice(VALUES))
        above[new] = above.pop(key) if numbers.random() < 0.7 else above[key]
        how = f"is also, or only, at {new!r:.40}"
    else:
        above.extend(above * 3)
        how = "occurs four times"
    _write(directory, json.dumps(tree))
    return f"{path} {how}"


# Files


def _entries(tree: Any) -> Iterator[Any]:
    yield from tree["tokenizers"].values()
    for component in tree["components"].values():
        yield component
        yield from component["data"] if "data" in component else ()


def _agree(directory: Path) -> None:
    """Make sizes and hashes in the manifest agree with the files."""
    tree = _content(directory)
    for entry in _entries(tree):
        content = (directory / entry["file"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write(directory, json.dumps(tree))


def _file(directory: Path, numbers: random.Random, manifest: bool = True) -> Path:
    files = sorted({entry["file"] for entry in _entries(_content(directory))})
    return directory / numbers.choice([*files, *(["manifest.json"] if manifest else [])])


def _damaged(content: bytes, numbers: random.Random) -> bytes:
    if not content:
        return b"\0"
    array, place = bytearray(content), numbers.randrange(len(content))
    match numbers.randrange(5):
        case 0:
            array[place] ^= 1 << numbers.randrange(8)
        case 1:
            del array[place:]
        case 2:
            array[place:place] = numbers.randbytes(numbers.randrange(1, 64))
        case 3:
            array[place : place + 16] = bytes([numbers.choice((0, 0x7F, 0x80, 0xFF))]) * 16
        case 4:
            other = numbers.randrange(len(content))
            array[place:place] = content[other : other + 64]
    return bytes(array)


def _damage_bytes(directory: Path, numbers: random.Random) -> str:
    path = _file(directory, numbers)
    path.write_bytes(_damaged(path.read_bytes(), numbers))
    return f"bytes of {path.name}, whose hash differs"


def _damage_bytes_agreeing(directory: Path, numbers: random.Random) -> str:
    path = _file(directory, numbers, manifest=False)
    for _ in range(numbers.choice((1, 1, 3))):
        path.write_bytes(_damaged(path.read_bytes(), numbers))
    _agree(directory)
    return f"bytes of {path.name}, whose hash agrees"


def _replace_entry(directory: Path, numbers: random.Random) -> str:
    """Put something else in the place of a file."""
    path = _file(directory, numbers)
    kept = path.with_name(f"kept-{path.name}")
    kind = numbers.choice(("pipe", "folder", "link", "device", "gone", "empty", "loop", "hole"))
    shutil.move(path, kept)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link":
            target = numbers.choice((kept.name, "/etc/passwd", "/proc/self/mem", "/dev/stdin", "."))
            path.symlink_to(target)
            kind = f"link to {target}"
        case "device":
            path.symlink_to(numbers.choice(("/dev/zero", "/dev/tty", "/dev/random", "/dev/null")))
        case "empty":
            path.touch()
        case "loop":
            path.symlink_to(path.name)
        case "hole":
            path.touch()
            os.truncate(path, numbers.choice((kept.stat().st_size, 1 << 34, 1 << 42)))
    return f"{path.name} is {kind}"


def _damage_tokenizer(directory: Path, numbers: random.Random) -> str:
    path = directory / _content(directory)["tokenizers"]["tokenizer"]["file"]
    tree = json.loads(path.read_bytes())
    place = numbers.choice(list(_places(tree)))
    value = numbers.choice(VALUES)
    _above(tree, place)[place[-1]] = value
    path.write_text(json.dumps(tree))
    _agree(directory)
    return f"tokenizer: {place} is {value!r:.60}"


# ONNX graphs


def _damage_graph(directory: Path, numbers: random.Random) -> str:
    graphs = sorted(p for p in directory.rglob("*.onnx") if p.stat().st_size > 100)
    if not graphs:
        return _damage_bytes_agreeing(directory, numbers)
    path = numbers.choice(graphs)
    model = onnx.load(path, load_external_data=False)
    changes = [numbers.choice(_CHANGES) for _ in range(numbers.choice((1, 1, 2)))]
    for change in changes:
        change(model, numbers)
    path.write_bytes(model.SerializeToString())
    _agree(directory)
    return f"{path.name}: {', '.join(change.__name__ for change in changes)}"


_OPERATORS = (
    *("Add", "Mul", "Div", "MatMul", "Conv", "ConvTranspose", "Reshape", "Transpose", "Concat"),
    *("Resize", "Gather", "ScatterND", "Slice", "Pad", "TopK", "NonZero", "Expand", "Tile", "Cast"),
    *("Softmax", "LayerNormalization", "GroupNormalization", "MaxPool", "Einsum", "Attention"),
    *("ConstantOfShape", "RandomNormal", "Range", "Split", "Identity", "SequenceConstruct", "If"),
    *("Loop", "Scan", "EPContext", "Shape", "StringNormalizer", "Nonsense", "", "FusedConv"),
)
_DOMAINS = ("", "com.microsoft", "latentforge", "ai.onnx.ml", "com.microsoft.nchwc", "x")
_NUMBERS = (0, 1, -1, 2, 3, 48, 255, 10**6, 2**31 - 1, 2**31, -(2**31), 2**62, -_BIG)
_SIZES = (0, 1, 2, 3, 5, 1000, 2**20, 2**31, 2**40, 2**62, -1, -5)


def _operator(model: Any, numbers: random.Random) -> None:
    node = numbers.choice(model.graph.node)
    node.op_type = numbers.choice(_OPERATORS)
    node.domain = numbers.choice((node.domain, numbers.choice(_DOMAINS)))


def _attribute(model: Any, numbers: random.Random) -> None:
    node = numbers.choice([n for n in model.graph.node if n.attribute] or list(model.graph.node))
    for attribute in list(node.attribute)[:1]:
        attribute.ints[:] = [numbers.choice(_NUMBERS) for _ in attribute.ints]
        attribute.i, attribute.f = numbers.choice(_NUMBERS), numbers.choice((0, -1, 1e38))
        attribute.s = numbers.choice((attribute.s, b"", b"/etc/passwd", b"\xff\xfe"))
    name = numbers.choice(("pads", "strides", "dilations", "axis", "perm", "kernel_shape", "to"))
    value = [numbers.choice(_NUMBERS) for _ in range(numbers.choice((1, 2, 4)))]
    if numbers.random() < 0.5 and name not in [each.name for each in node.attribute]:
        single = name in ("axis", "to")
        node.attribute.append(onnx.helper.make_attribute(name, value[0] if single else value))


def _wiring(model: Any, numbers: random.Random) -> None:
    node = numbers.choice(model.graph.node)
    names = [name for each in model.graph.node for name in (*each.input, *each.output)]
    if numbers.random() < 0.5 and node.input:
        node.input[numbers.randrange(len(node.input))] = numbers.choice((*names, "", "none"))
    elif node.output:
        node.output[numbers.randrange(len(node.output))] = numbers.choice((*names, "none"))


def _nodes(model: Any, numbers: random.Random) -> None:
    place = numbers.randrange(len(model.graph.node))
    if numbers.random() < 0.5:
        del model.graph.node[place]
    else:
        model.graph.node.append(model.graph.node[place])


def _initializer(model: Any, numbers: random.Random) -> None:
    if not model.graph.initializer:
        return
    tensor = numbers.choice(model.graph.initializer)
    match numbers.randrange(5):
        case 0:
            tensor.dims[:] = [numbers.choice(_SIZES) for _ in range(numbers.choice((0, 1, 4, 9)))]
        case 1:
            tensor.data_type = numbers.randrange(25)
        case 2:
            tensor.raw_data = numbers.randbytes(numbers.choice((0, 3, 64)))
        case 3:
            values = numpy_helper.from_array(np.full((4, 4), np.nan, np.float32), tensor.name)
            tensor.CopyFrom(values)
        case 4:
            model.graph.initializer.remove(tensor)


def _external(model: Any, numbers: random.Random) -> None:
    tensor = model.graph.initializer.add(name="further", data_type=1, dims=[2])
    if numbers.random() < 0.5 and len(model.graph.initializer) > 1:
        tensor = numbers.choice(model.graph.initializer)
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    names = (
        "/etc/passwd",
        "../outside",
        "manifest.json",
        "*/_ORT_MEM_ADDR_/*",
        "",
        "denoiser.onnx",
    )
    values = {
        "location": numbers.choice(names),
        "offset": str(numbers.choice(_NUMBERS)),
        "length": str(numbers.choice(_SIZES)),
    }
    del tensor.external_data[:]
    for key in values if numbers.random() < 0.8 else ["offset"]:
        tensor.external_data.add(key=key, value=values[key])


def _offsets(model: Any, numbers: random.Random) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key in ("offset", "length"):
                entry.value = numbers.choice((entry.value, str(numbers.choice(_NUMBERS)), "x", ""))


def _signature(model: Any, numbers: random.Random) -> None:
    value = numbers.choice([*model.graph.input, *model.graph.output])
    tensor = value.type.tensor_type
    match numbers.randrange(4):
        case 0:
            tensor.elem_type = numbers.randrange(25)
        case 1:
            for size in tensor.shape.dim:
                size.dim_value = numbers.choice(_SIZES)
        case 2:
            value.name = numbers.choice(("", "other", "sample", "\x1b[31m"))
        case 3:
            value.type.sequence_type.elem_type.tensor_type.elem_type = 1


def _header(model: Any, numbers: random.Random) -> None:
    model.ir_version = numbers.choice((0, 3, 10, 99, 2**40))
    model.opset_import[0].version = numbers.choice((0, 1, 7, 13, 21, 99, 2**40))
    if numbers.random() < 0.3:
        model.opset_import.add(domain=numbers.choice(_DOMAINS), version=1)
    if numbers.random() < 0.3:
        model.metadata_props.add(key="ort_config", value='{"session_options": {}}')


def _vector(name: str, *values: float) -> Any:
    dtype = np.int64 if all(isinstance(value, int) for value in values) else np.float32
    return numpy_helper.from_array(np.array(values, dtype), name)


def _large(size: int) -> dict[str, tuple[list[str], list[Any], dict[str, Any]]]:
    """Return inputs, constants and attributes of operators whose output has a size, by name."""
    one, side = _vector("large_one", 1.0), max(1.0, size**0.5)
    pixel = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "large_one")
    shape = _vector("large_shape", size)
    return {
        "ConstantOfShape": (["large_shape"], [shape], {}),
        "Expand": (["large_one", "large_shape"], [one, shape], {}),
        "Tile": (["large_one", "large_shape"], [one, shape], {}),
        "Pad": (["large_one", "large_shape"], [one, _vector("large_shape", size, 0)], {}),
        "Resize": (
            ["large_one", "", "large_shape"],
            [pixel, _vector("large_shape", 1.0, 1.0, side, side)],
            {"mode": "nearest"},
        ),
        "RandomNormal": ([], [], {"shape": [size]}),
        "Unique": (["large_shape"], [shape], {}),
    }


def _control(model: Any, numbers: random.Random) -> None:
    """Add a large constant, by one of the operators that make one, perhaps many times."""
    size = numbers.choice((4, 10**4, 2**28, 2**29, 2**30, 2**33, 2**40, 2**62, -1))
    name = numbers.choice(list(_large(1)))
    inputs, constants, attributes = _large(size)[name] if size > 0 else _large(1)[name]
    model.graph.initializer.extend(constants)
    count = numbers.choice((1, 1, 1, 30))
    for index in range(count):
        node = onnx.helper.make_node(name, inputs, [f"large{index}"], **attributes)
        model.graph.node.insert(0, node)
    target = numbers.choice(model.graph.node[count:])
    if target.input and numbers.random() < 0.7:
        target.input[0] = "large0"


def _repetition(model: Any, numbers: random.Random) -> None:
    """Move the nodes into a loop or a function, or add a graph of other kinds."""
    graph = model.graph
    count = numbers.choice((0, 3, 2**31, 2**62, -1))
    body = onnx.helper.make_graph(list(graph.node)[:3], "body", [], [])
    graph.initializer.append(_vector("count", count))
    match numbers.choice(("Loop", "Scan", "SequenceMap", "If", "function")):
        case "function":
            model.functions.add(name="f", domain="x").node.extend(list(graph.node)[:2])
            graph.node.append(onnx.helper.make_node("f", [], [], domain="x"))
        case name:
            graph.node.append(onnx.helper.make_node(name, ["count"], ["looped"], body=body))


def _many(model: Any, numbers: random.Random) -> None:
    """Add very many small messages, or many dimensions."""
    count = numbers.choice((*[100, 1000] * 4, 200_000))
    match numbers.randrange(4):
        case 0:
            model.graph.node.extend([onnx.NodeProto()] * count)
        case 1:
            model.graph.input[0].type.tensor_type.shape.dim.extend(
                [onnx.TensorShapeProto.Dimension()] * count
            )
        case 2:
            numbers.choice(model.graph.node).input.extend([""] * count)
        case 3:
            model.graph.value_info.extend([onnx.ValueInfoProto(name="x")] * count)


# OpenVINO graphs


def _damage_ir(directory: Path, numbers: random.Random) -> str:
    """Change attributes of an OpenVINO graph: sizes, offsets, types and wiring."""
    graphs = sorted(directory.rglob("*.xml"))
    if not graphs:
        return _damage_graph(directory, numbers)
    path = numbers.choice(graphs)
    text = path.read_text()
    places = list(re.finditer(r'([a-z_]+)="([^"]*)"', text))
    chosen = sorted(numbers.sample(places, numbers.choice((1, 1, 2))), key=lambda m: -m.start())
    for match in chosen:
        same = [other[2] for other in places if other[1] == match[1]]
        value = numbers.choice((*same, *map(str, _NUMBERS), *map(str, _SIZES), *_IR_VALUES))
        text = text[: match.start(2)] + value + text[match.end(2) :]
    path.write_text(text)
    _agree(directory)
    return f"{path.name}: {', '.join(match[0][:40] for match in chosen)}"


_IR_VALUES = (
    *("", "-1", "1,1", "2147483648,2", "?", "1..9", "f64", "i4", "u1", "string", "dynamic", "Loop"),
    *("TensorIterator", "Broadcast", "Tile", "Range", "ReadValue", "If", "Const", "Parameter"),
    *("Result", "MatMul", "Interpolate", "Pad", "opset1", "opset99", "extension", "x" * 1000),
)


_CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (
    *(_operator, _attribute, _attribute, _wiring, _nodes, _initializer, _external, _offsets),
    *(_signature, _header, _control, _repetition, _many),
)
_DAMAGES: dict[Callable[[Path, random.Random], str], int] = {
    _replace_value: 35,
    _replace_text: 5,
    _change_keys: 12,
    _damage_bytes: 8,
    _damage_bytes_agreeing: 10,
    _damage_graph: 22,
    _damage_ir: 8,
    _replace_entry: 8,
    _damage_tokenizer: 5,
}
"""Ways to damage a directory, with their weights."""
