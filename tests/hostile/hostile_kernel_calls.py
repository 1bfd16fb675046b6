"""Calls of latentforge's operators, by number: even ones are valid, odd ones damaged.

A valid call is compared with native_operators.py; a damaged one must be refused by name. Run as a
script, ``LIBRARY FIRST COUNT``, it makes the calls through ONNX Runtime, with exact buffers, and
prints those that end otherwise.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from native_operators import OPERATORS

from latentforge.optimize.half.bfloat16 import pack_bf16

__all__ = ["Call", "failures", "kernel_call"]

Array = np.ndarray[Any, Any]
Random = np.random.Generator
Damage = Callable[[Random, "Call"], "Call"]

INPUTS = {
    "Conv": ["x", "weight", "bias", "scale", "shift", "row", "residual", "size"],
    "MatMul": ["x", "weight", "bias", "residual"],
    "GroupNorm": ["x", "gamma", "beta"],
    "GroupScale": ["x", "gamma", "beta"],
    "Attention": ["query", "key", "value"],
}
TOLERANCE = 5e-5  # of the output's range
ROUNDED = 2e-3  # the same, where a last digit of an activation may round to the other bfloat16
BF16 = np.dtype(ml_dtypes.bfloat16)
REFUSAL = r"latentforge\.{}: (?:input|attribute) {}: expected .+, found .+; build the engine again"
FOREIGN = (
    r"Type Error: Type|Type \(tensor\(\w+\)\) of output"
    r"|is marked single but has an empty string"
)
"""Refusals of types and absent inputs by ONNX Runtime itself, when it loads the graph."""


@dataclass(frozen=True)
class Call:
    """One node with the values of its inputs.

    damage says what is wrong with it, if anything; its first word is the input or attribute that
    the refusal must name.
    """

    op_type: str
    inputs: dict[str, Array]
    attributes: dict[str, Any]
    constants: frozenset[str] = field(default=frozenset())
    damage: str = ""

    @property
    def outputs(self) -> int:
        """Return the number of outputs."""
        return 2 if self.op_type == "GroupScale" else 1

    def without(self, name: str) -> dict[str, Array]:
        """Return the inputs without one of them."""
        return {key: value for key, value in self.inputs.items() if key != name}


# -- valid calls -----------------------------------------------------------------------------------


def some(random: Random, *shape: int) -> Array:
    """Return normally distributed floats, in a buffer of exactly their size."""
    return random.standard_normal(shape, np.float32)


def packed(random: Random, channels: int, c: int, kernel: int) -> Array:
    """Return packed weights, zero beyond the last channel, in a type that the operators take."""
    blocks = -(-channels // 16)
    whole = some(random, blocks, c, kernel, kernel, 16) / np.float32(kernel * c**0.5)
    whole.transpose(0, 4, 1, 2, 3)[-1, channels - 16 * blocks or 16 :] = 0
    kind = random.choice(["float16", "float32", "bfloat16"])
    return pack_bf16(whole) if kind == "bfloat16" else whole.astype(kind)


def conv(random: Random) -> Call:
    """Return a convolution of any kernel, stride, enlargement and padding, with some fusions."""
    kernel, stride = int(random.choice([1, 3])), int(random.choice([1, 1, 2]))
    enlarged = int(random.integers(3))  # not, by upsample, to a size
    n, c, channels = (int(random.integers(1, end)) for end in (4, 70, 70))
    h, w = (int(side) for side in random.integers(kernel, 24, 2))
    pads = [int(pad) for pad in random.integers(0, kernel, 4)]
    seen = [2 * h, 2 * w] if enlarged == 1 else [h, w]
    inputs = {"x": some(random, n, h, w, c), "weight": packed(random, channels, c, kernel)}
    if enlarged == 2:
        seen = [int(random.integers(side, 3 * side)) for side in (h, w)]
        inputs["size"] = np.array([n, *seen, c])
    rows, columns = (
        (seen[axis] + pads[axis] + pads[axis + 2] - kernel) // stride + 1 for axis in (0, 1)
    )
    choices: dict[str, tuple[int, ...]] = {
        "bias": (channels,),
        "row": (int(random.choice([1, n])), channels),
        "residual": (n, rows, columns, channels),
    }
    normed = random.random() < 0.5
    chosen = {name: shape for name, shape in choices.items() if random.random() < 0.5}
    chosen |= dict.fromkeys(("scale", "shift"), (n, c)) if normed else {}
    inputs |= {name: some(random, *shape) for name, shape in chosen.items()}
    attributes = {"channels": channels, "pads": pads, "stride": stride}
    silu = int(normed and random.random() < 0.5)
    return Call("Conv", inputs, {**attributes, "silu": silu, "upsample": 1 + (enlarged == 1)})


def product(random: Random) -> Call:
    """Return a product of tokens of any rank, gated or not."""
    gated, c = random.random() < 0.4, int(random.integers(1, 200))
    channels = 32 * int(random.integers(1, 8)) if gated else int(random.integers(1, 90))
    shape = [int(size) for size in random.integers(1, 20, random.integers(1, 4))]
    inputs = {"x": some(random, *shape, c), "weight": packed(random, channels, c, 1)}
    if random.random() < 0.5:
        inputs["bias"] = some(random, channels)
    if not gated and random.random() < 0.5:
        inputs["residual"] = some(random, *shape, channels)
    return Call("MatMul", inputs, {"channels": channels, "gated": int(gated)})


def norm(random: Random) -> Call:
    """Return a group normalization, or its scale and shift."""
    groups, each = (int(size) for size in random.integers(1, 9, 2))
    n, h, w = (int(size) for size in random.integers(1, 40, 3))
    c = groups * each
    inputs = {"x": some(random, n % 3 + 1, h, w, c), "gamma": some(random, c)}
    inputs["beta"] = some(random, c)
    attributes: dict[str, Any] = {"groups": groups, "epsilon": 1e-3}
    if random.random() < 0.5:
        return Call("GroupScale", inputs, attributes)
    return Call("GroupNorm", inputs, {**attributes, "silu": int(random.integers(2))})


def attention(random: Random) -> Call:
    """Return an attention of any numbers of tokens and sizes of heads."""
    n, heads = (int(size) for size in random.integers(1, 4, 2))
    size = int(random.integers(1, 100))
    queries, keys = (int(random.integers(1, end)) for end in (200, 300))
    shapes = {"query": queries, "key": keys, "value": keys}
    inputs = {name: some(random, n, tokens, heads * size) for name, tokens in shapes.items()}
    return Call("Attention", inputs, {"heads": heads, "scale": size**-0.5})


OPERATOR_CALLS = [conv, conv, product, norm, attention]


def emptied(call: Call) -> Call:
    """Return the call for a batch of no images or token rows, which is legal."""
    inputs, n = dict(call.inputs), len(call.inputs.get("x", call.inputs.get("query", ())))
    batched = {"x", "query", "key", "value", "scale", "shift", "residual"}
    if call.op_type == "MatMul" and call.inputs["x"].ndim == 1:
        return call
    for name in batched & inputs.keys():
        inputs[name] = inputs[name][:0].copy()
    if "row" in inputs and len(inputs["row"]) == n > 1:
        inputs["row"] = inputs["row"][:0].copy()
    if "size" in inputs:
        inputs["size"] = np.array([0, *inputs["size"][1:]])
    return replace(call, inputs=inputs)


# -- damage ----------------------------------------------------------------------------------------

HUGE = [2**31, 2**62, 2**63 - 1, -1, -(2**63), 0]


def set_attribute(call: Call, name: str, value: Any) -> Call:
    """Return the call with another value of an attribute."""
    attributes = {**call.attributes, name: value}
    return replace(call, attributes=attributes, damage=f"{name} = {value}")


def drop_attribute(random: Random, call: Call) -> Call:
    """Omit a required attribute."""
    name = str(random.choice(sorted(call.attributes.keys() - {"gated"})))
    attributes = {key: value for key, value in call.attributes.items() if key != name}
    return replace(call, attributes=attributes, damage=f"{name} absent")


def retype_attribute(random: Random, call: Call) -> Call:
    """Give an attribute a value of another type."""
    name = str(random.choice(sorted(call.attributes)))
    return set_attribute(call, name, [b"text", ["a", "b"]][random.integers(2)])


def ruin_number(random: Random, call: Call) -> Call:
    """Give an attribute a number that no kernel takes."""
    names = sorted(call.attributes.keys() - {"pads"})
    name, value = str(random.choice(names)), int(random.choice([*HUGE[:3], -1, -(2**63)]))
    if name in ("epsilon", "scale"):
        return set_attribute(call, name, [float("nan"), float("inf")][random.integers(2)])
    return set_attribute(call, name, value)


def foreign_attribute(random: Random, call: Call) -> Call:
    """Give a Conv an attribute of ONNX's own operator."""
    if call.op_type != "Conv":
        return ruin_number(random, call)
    choices: list[tuple[str, Any]] = [
        *(("auto_pad", "SAME_UPPER"), ("dilations", [2, 2]), ("dilations", [0, -1]), ("group", 2)),
        *(("kernel_shape", [3, 3]), ("strides", [1, 1])),
    ]
    return set_attribute(call, *choices[random.integers(len(choices))])


def ruin_pads(random: Random, call: Call) -> Call:
    """Give a Conv pads that no kernel takes, or one that its own kernel does not take."""
    if call.op_type != "Conv":
        return ruin_number(random, call)
    pads = [0] * 4
    pads[random.integers(4)] = call.inputs["weight"].shape[2]
    choices = [pads, pads, pads, [0, 0, 48, 48], [-1] * 4, [1, 1], [2**62] * 4, [0] * 9]
    return set_attribute(call, "pads", choices[random.integers(len(choices))])


def reshape(random: Random, call: Call) -> Call:
    """Cut or lengthen an axis of an input other than the first, or change its rank."""
    name = str(random.choice(list(call.inputs)[1:]))
    value, axis = call.inputs[name], int(random.integers(call.inputs[name].ndim))
    how = int(random.integers(5))
    changed = [
        lambda: value.take(np.arange(value.shape[axis] + 1) % value.shape[axis], axis),
        lambda: value.take(np.arange(value.shape[axis] - 1), axis),
        lambda: value.take([], axis),
        lambda: value[None],
        lambda: value.reshape(-1, 1, 1, 1, 1, 1, 1),
    ][how]()
    if (name, axis, how, len(changed)) == ("row", 0, 1, 1):  # one row for all images is legal
        changed = changed[None]
    if call.op_type == "Attention" and axis == 1 and how < 2 and len(changed.shape) == 3:
        # a key of other tokens does not fit the value, whichever of them is changed
        name, changed = "value", np.concatenate([call.inputs["value"]] * 2, 1)
    inputs = {**call.inputs, name: np.ascontiguousarray(changed)}
    return replace(call, inputs=inputs, damage=f"{name} of {changed.shape}")


def empty_first(random: Random, call: Call) -> Call:
    """Leave no channels, or no pixels, in the first input; weights follow the channels."""
    name, *_ = call.inputs
    value = call.inputs[name]
    pixels = call.op_type in ("Conv", "GroupNorm", "GroupScale") and random.random() < 0.5
    axis = int(random.integers(1, value.ndim - 1)) if pixels else value.ndim - 1
    inputs = {**call.inputs, name: np.ascontiguousarray(value.take([], axis))}
    if not pixels and "weight" in inputs:
        inputs["weight"] = np.ascontiguousarray(inputs["weight"][:, :0])
    return replace(call, inputs=inputs, damage=f"{name} of {inputs[name].shape}")


def retype_input(random: Random, call: Call) -> Call:
    """Give an input another type of element."""
    name = str(random.choice(list(call.inputs)))
    kinds = [np.float64, np.int32, np.uint8, np.bool_, np.str_]
    value = call.inputs[name]
    value = value.astype(np.float32) if value.dtype == BF16 else value  # which is cast to no text
    changed = value.astype(kinds[random.integers(len(kinds))])
    return replace(call, inputs={**call.inputs, name: changed}, damage=f"{name} of {changed.dtype}")


def ruin_size(random: Random, call: Call) -> Call:
    """Give a Conv a size that its image cannot take."""
    if call.op_type != "Conv":
        return reshape(random, call)
    n, h, w, c = call.inputs["x"].shape
    place, value = int(random.integers(4)), int(random.choice([*HUGE, -h, 17 * max(h, w)]))
    size = np.array([n, h, w, c])
    size[place] = value
    changed = size if random.random() < 0.8 else size[: random.integers(4)]
    inputs = {**call.inputs, "size": changed.copy()}
    return replace(call, inputs=inputs, damage=f"size {changed.tolist()}")


def drop_companion(_: Random, call: Call) -> Call:
    """Leave out an input that another input or attribute needs."""
    if call.op_type == "Conv":
        shape = (call.inputs["x"].shape[0], call.inputs["x"].shape[3])
        inputs = {**call.without("shift"), "scale": np.ones(shape, np.float32)}
        return replace(call, inputs=inputs, damage="shift absent")
    last = list(INPUTS[call.op_type])[1]
    return replace(call, inputs=call.without(last), damage=f"{last} absent")


DAMAGES: list[Damage] = [
    *(drop_attribute, retype_attribute, ruin_number, foreign_attribute, reshape, reshape),
    *(empty_first, retype_input, ruin_size, ruin_pads, drop_companion),
]
SHAPING = (ruin_number, foreign_attribute, ruin_pads, ruin_size, empty_first)
"""Damages of what an output's shape follows from, which a residual's shape would give away."""


def kernel_call(index: int) -> Call:
    """Return the call of this number."""
    random = np.random.default_rng([index, 20])
    call = OPERATOR_CALLS[index // 2 % len(OPERATOR_CALLS)](random)
    if index % 2:
        damage = DAMAGES[int(random.integers(len(DAMAGES)))]
        call = replace(call, inputs=call.without("residual")) if damage in SHAPING else call
        call = damage(random, call)
    elif random.random() < 0.08:
        call = emptied(call)
    constants = {name for name in list(call.inputs)[1:] if random.random() < 0.5}
    constants |= {name for name, a in call.inputs.items() if a.dtype == BF16}  # no feed can be
    return replace(call, constants=frozenset(constants))


# -- running them ----------------------------------------------------------------------------------


def model_of(call: Call) -> bytes:
    """Return the serialized graph of a call, whose inputs have free shapes."""
    helper = onnx.helper
    names = INPUTS[call.op_type]
    used = [name if name in call.inputs else "" for name in names]
    outputs = [f"y{place}" for place in range(call.outputs)]
    node = helper.make_node(
        call.op_type, used, outputs, name="damaged", domain="latentforge", **call.attributes
    )
    feeds = [name for name in call.inputs if name not in call.constants]
    kinds = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in call.inputs.items()}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, kinds[name], [None] * call.inputs[name].ndim)
            for name in feeds
        ],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [onnx.numpy_helper.from_array(call.inputs[name], name) for name in call.constants],
    )
    opsets = [
        helper.make_opsetid(domain, number) for domain, number in (("", 20), ("latentforge", 1))
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def ran(call: Call, library: Path) -> list[Array]:
    """Run a call in ONNX Runtime, with a buffer of its own for each tensor."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model_of(call), options)
    feeds = {name: a for name, a in call.inputs.items() if name not in call.constants}
    outputs: list[Array] = session.run(None, feeds)
    return outputs


def reference(call: Call) -> list[Array]:
    """Return the outputs of a valid call by its definition."""
    operator = next(each for each in OPERATORS if each.__name__ == call.op_type)
    empty = next(iter(call.inputs.values())).size == 0  # then of one image, without that image
    arrays = {
        name: np.ones((1, *a.shape[1:]), a.dtype) if empty and len(a) == 0 else a
        for name, a in call.inputs.items()
    }
    inputs = [arrays.get(name) for name in INPUTS[call.op_type]]
    outputs = operator._run(None, *inputs, **call.attributes)  # type: ignore[arg-type]
    return [output[: 0 if empty else None] for output in outputs]


def difference(got: Array, wanted: Array, tolerance: float) -> str:
    """Return how an output differs from what it should be, or nothing."""
    if got.shape != wanted.shape:
        return f"{got.shape} instead of {wanted.shape}"
    if got.size == 0:
        return ""
    error = float(np.abs(got - wanted).max())
    allowed = tolerance * max(float(np.ptp(wanted)), float(np.abs(wanted).max()))
    return "" if error <= allowed else f"off by {error}"


def verdict(call: Call, library: Path) -> str:
    """Return what is wrong with the end of a call, or nothing."""
    try:
        outputs = ran(call, library)
    except Exception as error:  # ONNX Runtime's errors share no base class
        message = str(error)
        subject = call.damage.partition(" ")[0]
        own = re.search(REFUSAL.format(call.op_type, subject), message)
        return "" if call.damage and (own or re.search(FOREIGN, message)) else message
    if call.damage:
        return "accepted"
    pairs = zip(outputs, reference(call), strict=True)
    rounds = "scale" in call.inputs and call.inputs["weight"].dtype == BF16
    return "".join(difference(*pair, ROUNDED if rounds else TOLERANCE) for pair in pairs)


def failures(library: Path, first: int, count: int) -> Iterator[str]:
    """Yield a line for each call that ends otherwise than it should."""
    for index in range(first, first + count):
        call = kernel_call(index)
        print(index, call.op_type, call.damage or "valid", file=sys.stderr, flush=True)
        if wrong := verdict(call, library):
            yield f"{index} {call.op_type} ({call.damage or 'valid'}): {' '.join(wrong.split())}"


if __name__ == "__main__":
    found = list(failures(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    print("\n".join(found))
    sys.exit(bool(found))
