"""Graphs that make a library allocate or run without bound are refused before it reads them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import TEXT_ENCODER, Handmade

from latentforge.runtime import protobuf
from latentforge.runtime.errors import ManifestError
from latentforge.runtime.files import MANIFEST_FILE, hash_file
from latentforge.runtime.manifest import Manifest

onnx = pytest.importorskip("onnx")
helper = onnx.helper

_COPIES = 5000


def model(*nodes: Any, weights: tuple[Any, ...] = ()) -> Any:
    graph = helper.make_graph(nodes, "m", [], [], list(weights))
    return helper.make_model(graph)


def tensor(**fields: Any) -> Any:
    return onnx.TensorProto(**{"name": "w", "data_type": 1, **fields})


def repeating(name: str) -> Any:
    body = helper.make_graph([helper.make_node(name, ["x"], ["y"])], "body", [], [])
    return helper.make_node(name, ["count", "", "x"], ["y"], body=body)


def calling() -> Any:
    """Return a model of two functions, of which one calls the other twice."""
    made, opset = model(helper.make_node("f", [], [], domain="d")), helper.make_opsetid("", 17)
    twice = [helper.make_node("g", [], [], domain="d")] * 2
    made.functions.append(helper.make_function("d", "f", [], [], twice, [opset]))
    made.functions.append(helper.make_function("d", "g", [], [], [], [opset]))
    return made


def field(number: int, content: bytes) -> bytes:
    """Return a field of a protobuf message, of any size."""
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def many(content: bytes, *path: int) -> bytes:
    """Return a message with thousands of copies of a field, in others along a path."""
    content *= _COPIES
    for number in reversed(path):
        content = field(number, content)
    return content


UNBOUNDED: dict[str, Callable[[], bytes]] = {
    **{
        f"{name} in {place}": lambda name=name, place=place: (
            model(repeating(name))
            if place == "a graph"
            else model(
                helper.make_node("If", ["x"], ["y"], then_branch=model(repeating(name)).graph)
            )
        ).SerializeToString()
        for name in ("Loop", "Scan", "SequenceMap", "BeamSearch", "Nonsense")
        for place in ("a graph", "a branch")
    },
    "functions": lambda: calling().SerializeToString(),
    **{
        f"dims {dims}": lambda dims=dims: model(
            weights=(tensor(dims=dims, raw_data=bytes(64)),)
        ).SerializeToString()
        for dims in ([2**40], [2**31, 2**31], [2**62, 2], [-1], [513], [1] * 65)
    },
    "dims without data": lambda: model(weights=(tensor(dims=[10**9]),)).SerializeToString(),
    "dims of a list of numbers": lambda: model(
        weights=(tensor(data_type=7, dims=[2**40], int64_data=[1]),)
    ).SerializeToString(),
    "packed dims": lambda: field(7, field(5, field(1, b"\x01" * 80) + field(9, bytes(8)))),
    "a constant": lambda: model(
        helper.make_node("Constant", [], ["y"], value=tensor(dims=[2**40]))
    ).SerializeToString(),
    "a sparse tensor": lambda: model(
        helper.make_node(
            *("Constant", [], ["y"]),
            sparse_value=helper.make_sparse_tensor(
                onnx.numpy_helper.from_array(np.ones(1, np.float32), "v"),
                onnx.numpy_helper.from_array(np.zeros(1, np.int64), "i"),
                [10**6, 10**6],
            ),
        )
    ).SerializeToString(),
    "nodes": lambda: many(b"\x0a\x00", 7),
    "names of a node": lambda: many(b"\x0a\x00", 7, 1),
    "dimensions": lambda: many(b"\x0a\x00", 7, 13, 2, 1, 2),
    "integers of an attribute": lambda: many(b"\x40\x01", 7, 1, 5),
    "unknown fields": lambda: many(b"\xa2\x06\x00", 7, 1, 5),
    "numbers of a tensor": lambda: field(7, field(5, field(7, b"\x01" * 40 * _COPIES))),
}


@pytest.fixture
def engines(handmade: Handmade) -> Callable[[bytes], Path]:
    """A function that gives engines this denoiser, with the right hash."""
    directory = handmade(onnx={"text_encoder": TEXT_ENCODER})

    def write(content: bytes) -> Path:
        path = directory / "denoiser.onnx"
        path.write_bytes(content)
        tree = msgspec.json.decode((directory / MANIFEST_FILE).read_bytes())
        entry = {"sha256": hash_file(path), "bytes": path.stat().st_size}
        tree["components"]["denoiser"] |= entry
        (directory / MANIFEST_FILE).write_bytes(msgspec.json.encode(tree))
        return directory

    return write


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_graphs_without_a_bound(
    engines: Callable[[bytes], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protobuf, "_MAX_FIELDS", _COPIES - 1)
    directory = engines(UNBOUNDED[kind]())
    with pytest.raises(ManifestError, match="no graph of an engine: (it|a tensor)"):
        Manifest.read(directory)


def test_a_graph_of_very_many_fields(engines: Callable[[bytes], Path]) -> None:
    directory = engines(field(7, b"\x0a\x00" * 10_000_000))
    start = time.monotonic()
    with pytest.raises(ManifestError, match="more than 1,048,576 fields"):
        Manifest.read(directory)
    assert time.monotonic() - start < 20


BOUNDED: dict[str, Any] = {
    "branches": lambda: helper.make_node("If", ["x"], ["y"], then_branch=model().graph),
    "an empty constant": lambda: helper.make_node("Constant", [], ["y"], value=tensor(dims=[0])),
    "a scalar": lambda: helper.make_node(
        "Constant", [], ["y"], value=helper.make_tensor("s", 1, [], [1.0])
    ),
    **{
        f"a constant of type {type_}": lambda type_=type_: helper.make_node(
            "Constant", [], ["y"], value=helper.make_tensor("t", type_, [4], [1, 0, 1, 0])
        )
        for type_ in (1, 2, 3, 6, 7, 9, 10, 11, 13, 16, 17, 21, 22)
    },
    "text": lambda: helper.make_node(
        "Constant", [], ["y"], value=helper.make_tensor("t", 8, [3], [b"", b"", b""])
    ),
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_graphs_with_bounds(engines: Callable[[bytes], Path], kind: str) -> None:
    Manifest.read(engines(model(BOUNDED[kind]()).SerializeToString()))
