"""Checkpoints that are damaged in one place, by number.

Each case damages a copy of a tiny checkpoint: a value of a JSON file, the text of one, weights, a
tokenizer, or a file system entry. The number alone decides what is damaged.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FAMILIES", "describe", "write_case"]

FAMILIES = ("sd", "sdxl", "upscaler", "decidiffusion-1", "pix2pix")

Damage = Callable[[random.Random, Path], str]
"""Damages a checkpoint, and returns a name of what was damaged."""

_DEEP = 200_000

# Values as JSON text, since Python would refuse to write some of them.
_VALUES: tuple[str, ...] = (
    *("null", "true", "false", '""', '"a"', "[]", "{}", "0", "-1", "1", "2", "3", "7", "0.5"),
    *("-0.0", "1e308", "-1e308", "1e999", "1e-320", "NaN", "Infinity", "-Infinity"),
    *("2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808"),
    *("1000000000", "1048576", "65536", "1000", "-9223372036854775809", "1" + "0" * 5000),
    *(r'"\ud800"', r'"\u0000"', r'"\u001b[31m"', '"../../../etc/passwd"', '"/dev/zero"'),
    *('"torch.nn"', '"os.system"', '"__class__"', f'"{"x" * 100_000}"', '"ⅷ"', '"1"', '"none"'),
    *("[null]", "[[]]", "[1]", "[0, 0]", "[-1, 2]", '["a", "b"]', "[1e308, 1e308]", "[[1, 2], 3]"),
    *("[" + ", ".join(["1"] * 70) + "]", "[" + ", ".join(["1000000"] * 4) + "]"),
    "[" + ", ".join(["1"] * 100_000) + "]",
    "[" * 60 + "]" * 60,
    *('{"a": 1}', '{"__class__": "int"}', '{"value": 3, "_class_name": "X"}'),
)

_TEXTS: Mapping[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1" + b"0" * 5000,
    "no keys": b"{}",
    "deep lists": b"[" * _DEEP + b"]" * _DEEP,
    "deep objects": b'{"a":' * _DEEP + b"1" + b"}" * _DEEP,
    "zero bytes": bytes(1000),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    "many keys": json.dumps({f"key{i}": i for i in range(100_000)}).encode(),
}

_DTYPES = ("F64", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "U8", "X32", "", "I4", "BF16", "F16", "C64")
_SHAPES: tuple[Any, ...] = (
    *([], [0], [-1], [2**63], [2**32, 2**32], [2**31] * 4, [1] * 100, ["a"], "a", None, [1.5]),
    *([2**64], [10**30], [1], [3, 3], {"a": 1}),
)
_OFFSETS: tuple[Any, ...] = (
    *([0, 0], [0, 2**63], [-8, 8], [8, 0], [2**64, 2**64 + 4], [0], [0, 4, 8], "a", None, [0.5, 4]),
    *([0, 4], [10**12, 10**12 + 4], [True, False]),
)


def write_case(index: int, bases: Mapping[str, Path], target: Path) -> str:
    """Write the damaged checkpoint of an index, and return the name of what was damaged.

    Args:
        index: of the case.
        bases: intact checkpoints by family.
        target: directory to write.
    """
    rng = random.Random(index)
    family = FAMILIES[index % len(FAMILIES)]
    _copy(bases[family], target)
    kind = rng.choices(list(_KINDS), [weight for weight, _ in _KINDS.values()])[0]
    return f"{family}, {kind}: {_KINDS[kind][1](rng, target)}"


def describe(index: int, bases: Mapping[str, Path], scratch: Path) -> str:
    """Return the name of a case, as write_case() does, without leaving its files."""
    try:
        return write_case(index, bases, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copy(base: Path, target: Path) -> None:
    """Copy a checkpoint by hard links: whoever changes a file replaces it."""
    shutil.copytree(base, target, copy_function=os.link)


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _file(rng: random.Random, checkpoint: Path, pattern: str) -> Path:
    return rng.choice(sorted(checkpoint.glob(pattern)))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a JSON document."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


def _json_value(rng: random.Random, checkpoint: Path) -> str:
    """Replace one or two values of a configuration."""
    names = []
    for _ in range(rng.choice((1, 1, 2))):
        path = _file(rng, checkpoint, "**/*config.json") if rng.random() < 0.9 else None
        path = path or checkpoint / "model_index.json"
        document = json.loads(path.read_text())
        place = rng.choice(_places(document)[1:] or [("a",)])
        text = rng.choice(_VALUES)
        node = document
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = "@HERE@"
        written = json.dumps(document).replace('"@HERE@"', text)
        _replace(path, written.encode())
        names.append(f"{path.relative_to(checkpoint)} {place} = {text[:40]}")
        if not _is_plain(written):
            break
    return "; ".join(names)


def _is_plain(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


# Keys of the classes that the tiny checkpoints leave at their defaults, and of other classes.
_KEYS = (
    *("num_class_embeds", "class_embed_type", "dual_cross_attention", "only_cross_attention"),
    *("time_embedding_type", "time_embedding_dim", "time_embedding_act_fn", "conv_in_kernel"),
    *("conv_out_kernel", "encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads"),
    *("attention_type", "mid_block_type", "mid_block_scale_factor", "act_fn", "norm_eps"),
    *("addition_embed_type_num_heads", "resnet_time_scale_shift", "resnet_out_scale_factor"),
    *("cross_attention_norm", "transformer_layers_per_block", "upcast_attention", "freq_shift"),
    *("layers_per_block", "num_hidden_layers", "attention_head_dim", "vocab_size", "sample_size"),
    *("norm_num_groups", "downsample_padding", "hidden_act", "layer_norm_eps", "shift_factor"),
    *("max_position_embeddings", "projection_dim", "latents_mean", "latents_std"),
    *("quantization_config", "auto_map", "_class_name", "architectures", "text_config"),
    *("trained_betas", "num_train_timesteps", "solver_order", "sigma_min", "sigma_max", "rho"),
    *("beta_schedule", "beta_start", "beta_end", "timestep_spacing", "steps_offset", "order"),
    *("use_karras_sigmas", "prediction_type", "thresholding", "original_inference_steps"),
    *("model_max_length", "added_tokens_decoder", "pad_token", "unk_token", "bos_token"),
    *("additional_special_tokens", "chat_template", "tokenizer_class", "force_upcast"),
    *("_name_or_path", "attn_implementation", "torch_dtype", "dtype", "pad_token_id"),
)


def _json_key(rng: random.Random, checkpoint: Path) -> str:
    """Add a key, or remove one."""
    path = _file(rng, checkpoint, "**/*.json")
    document = json.loads(path.read_text())
    name = path.relative_to(checkpoint)
    if rng.random() < 0.25 and document:
        key = rng.choice(sorted(document))
        del document[key]
        _replace(path, json.dumps(document).encode())
        return f"{name} without {key}"
    key, text = rng.choice(_KEYS), rng.choice(_VALUES)
    _replace(path, json.dumps({**document, key: "@HERE@"}).replace('"@HERE@"', text).encode())
    return f"{name} {key} = {text[:40]}"


def _json_text(rng: random.Random, checkpoint: Path) -> str:
    path = _file(rng, checkpoint, "**/*.json")
    content = path.read_bytes()
    if rng.random() < 0.5:
        name = rng.choice(sorted(_TEXTS))
        content = _TEXTS[name]
    elif rng.random() < 0.5:
        name, content = "cut off", content[: rng.randrange(len(content))]
    else:
        name, content = "changed bytes", _noise(rng, content)
    _replace(path, content)
    return f"{path.relative_to(checkpoint)}: {name}"


def _noise(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 20))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _weights(rng: random.Random, checkpoint: Path) -> str:
    """Damage a safetensors file."""
    path = _file(rng, checkpoint, "**/*.safetensors")
    content = path.read_bytes()
    header, data = _header(content)
    key = rng.choice([name for name in header if name != "__metadata__"])
    name = rng.choice(sorted(_WEIGHTS))
    _replace(path, _WEIGHTS[name](rng, content, header, data, key))
    if name == "a sparse terabyte":
        os.truncate(path, 1 << 40)
    return f"{path.relative_to(checkpoint)}: {name} ({key})"


def _changed(field: str, values: tuple[Any, ...]) -> Callable[..., bytes]:
    def change(
        rng: random.Random, _: bytes, header: dict[str, Any], data: bytes, key: str
    ) -> bytes:
        header[key][field] = rng.choice(values)
        return _with_header(json.dumps(header).encode(), data)

    return change


def _swapped(rng: random.Random, _: bytes, header: dict[str, Any], data: bytes, key: str) -> bytes:
    other = rng.choice([name for name in header if name != "__metadata__"])
    header[key]["data_offsets"] = header[other]["data_offsets"]
    return _with_header(json.dumps(header).encode(), data)


def _cut(rng: random.Random, content: bytes, *_: Any) -> bytes:
    return content[: rng.randrange(len(content))]


def _twice(_: random.Random, __: bytes, header: dict[str, Any], data: bytes, key: str) -> bytes:
    text = json.dumps(header)
    extra = json.dumps(key) + ": " + json.dumps({**header[key], "shape": [1]})
    return _with_header((text[:-1] + ", " + extra + "}").encode(), data)


def _claims(length: int) -> Callable[..., bytes]:
    return lambda _, content, *__: struct.pack("<Q", length) + content[8:]


def _unknown_names(
    _: random.Random, __: bytes, header: dict[str, Any], data: bytes, key: str
) -> bytes:
    header["\x1b[31m" + key] = header.pop(key)
    return _with_header(json.dumps(header).encode(), data)


def _extreme(
    rng: random.Random, content: bytes, header: dict[str, Any], data: bytes, key: str
) -> bytes:
    start, end = header[key]["data_offsets"]
    value = rng.choice((float("nan"), float("inf"), 3e38, -3e38, 1e-40))
    filled = struct.pack("<f", value) * ((end - start) // 4)
    head = content[: len(content) - len(data)]
    return head + data[:start] + filled + data[end:]


def _many(_: random.Random, __: bytes, header: dict[str, Any], data: bytes, key: str) -> bytes:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    header.update({f"extra.{index}": empty for index in range(100_000)})
    return _with_header(json.dumps(header).encode(), data)


def _metadata(rng: random.Random, _: bytes, header: dict[str, Any], data: bytes, key: str) -> bytes:
    header["__metadata__"] = rng.choice(({"format": "tf"}, {"a": 1}, [], None, {"format": ""}))
    return _with_header(json.dumps(header).encode(), data)


_WEIGHTS: Mapping[str, Callable[..., bytes]] = {
    "dtype": _changed("dtype", _DTYPES),
    "shape": _changed("shape", _SHAPES),
    "offsets": _changed("data_offsets", _OFFSETS),
    "offsets of another": _swapped,
    "cut off": _cut,
    "changed bytes": lambda rng, content, *_: _noise(rng, content),
    "a name that occurs twice": _twice,
    "header of 2^63 bytes": _claims(2**63),
    "header of 2^40 bytes": _claims(2**40),
    "header of all bytes": _claims(2**64 - 1),
    "no header": _claims(0),
    "a control character in a name": _unknown_names,
    "extreme values": _extreme,
    "many weights": _many,
    "metadata": _metadata,
    "a sparse terabyte": lambda _, content, *__: content,
}


def _shards(rng: random.Random, checkpoint: Path) -> str:
    """Replace a weight file by an index of shards that is wrong."""
    path = _file(rng, checkpoint, "**/*.safetensors")
    names = ("../model.safetensors", "/etc/passwd", "a.bin", "", ".", "..", "\0", "a" * 5000, 3)
    names = (*names, None, [], "missing.safetensors", path.name, "sub/part.safetensors", "\ud800")
    named = rng.choice(names)
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"weight": named}}))
    if rng.random() < 0.7:
        path.unlink()
    return f"{index.relative_to(checkpoint)} names {named!r:.40}"


def _vocabulary(rng: random.Random, checkpoint: Path) -> str:
    """Damage the vocabulary or the merges of a tokenizer."""
    path = _file(rng, checkpoint, "tokenizer*/vocab.json")
    kind = rng.choice(sorted(_TOKENS))
    _TOKENS[kind](rng, path)
    return f"{path.parent.name}: {kind}"


def _token_id(rng: random.Random, path: Path) -> None:
    vocabulary = json.loads(path.read_text())
    text = rng.choice(_VALUES)
    vocabulary[rng.choice(sorted(vocabulary))] = "@HERE@"
    _replace(path, json.dumps(vocabulary).replace('"@HERE@"', text).encode())


def _merges(lines: Callable[[random.Random, list[str]], list[str]]) -> Damage:
    def change(rng: random.Random, path: Path) -> str:
        merges = path.with_name("merges.txt")
        changed = lines(rng, merges.read_text().splitlines())
        _replace(merges, "\n".join(changed).encode(errors="surrogatepass"))
        return ""

    return change


def _added(rng: random.Random, path: Path) -> None:
    config = path.with_name("tokenizer_config.json")
    content = rng.choice(("<cat>", "", " ", "a", "\0", "x" * 100_000, 3, None, "\ud800"))
    number = rng.choice((1076, 0, -1, 2**32, 10**9, "x"))
    token = {"content": content, "lstrip": True, "special": rng.choice((True, False, "x"))}
    document = {**json.loads(config.read_text()), "added_tokens_decoder": {str(number): token}}
    _replace(config, json.dumps(document).encode())


def _many_added(rng: random.Random, path: Path) -> None:
    config = path.with_name("tokenizer_config.json")
    tokens = {str(1076 + i): {"content": f"<t{i}>", "special": False} for i in range(20_000)}
    document = {**json.loads(config.read_text()), "added_tokens_decoder": tokens}
    _replace(config, json.dumps(document).encode())


def _tokenizer_json(rng: random.Random, path: Path) -> None:
    model = {"type": rng.choice(("BPE", "WordLevel", "Unigram", "X", 3)), "vocab": {"a": 0}}
    growth = {"type": "Replace", "pattern": {"String": "o"}, "content": "o" * 1000}
    document: dict[str, Any] = {
        "version": "1.0",
        "model": {**model, "merges": [], "dropout": rng.choice((None, 0.5, "x"))},
        "normalizer": {"type": "Sequence", "normalizers": [growth] * rng.choice((1, 3, 1000))},
        "added_tokens": rng.choice(([], [{"id": 2**40, "content": "x"}], 3)),
    }
    path.with_name("tokenizer.json").write_text(json.dumps(document))


_TOKENS: Mapping[str, Callable[[random.Random, Path], Any]] = {
    "an id": _token_id,
    "added token": _added,
    "many added tokens": _many_added,
    "tokenizer.json": _tokenizer_json,
    "no merges": _merges(lambda _, lines: []),
    "cut merges": _merges(lambda rng, lines: lines[: rng.randrange(len(lines))]),
    "merges without partner": _merges(lambda rng, lines: [*lines, "onlyone"]),
    "merges of unknown tokens": _merges(lambda rng, lines: [*lines, "zzzz qqqq"]),
    "many merges": _merges(lambda rng, lines: lines * 200),
    "long merges": _merges(lambda rng, lines: [*lines, "a" * 10**6 + " " + "b" * 10**6]),
    "binary merges": _merges(lambda rng, lines: ["\ud800 \udfff", "\0 \0"]),
}


def _entry(rng: random.Random, checkpoint: Path) -> str:
    """Replace a file or a folder by another kind of entry."""
    path = rng.choice(sorted(checkpoint.rglob("*")))
    name = rng.choice(sorted(_ENTRIES))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    _ENTRIES[name](path)
    return f"{path.relative_to(checkpoint)} is {name}"


def _linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


_ENTRIES: Mapping[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a link to /dev/zero": _linked("/dev/zero"),
    "a link to /dev/random": _linked("/dev/random"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": _linked("/nowhere/at/all"),
    "a link to /": _linked("/"),
    "a link to /proc/self": _linked("/proc/self"),
    "a link to /proc/self/mem": _linked("/proc/self/mem"),
    "a link to a terminal": _linked("/dev/tty"),
    "a sparse terabyte": _sparse,
}

_KINDS: Mapping[str, tuple[int, Damage]] = {
    "value": (40, _json_value),
    "key": (20, _json_key),
    "text": (8, _json_text),
    "weights": (14, _weights),
    "shards": (3, _shards),
    "tokenizer": (8, _vocabulary),
    "entry": (7, _entry),
}
