"""No file is opened that the manifest does not list, wherever an ONNX graph names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import Handmade

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.files import hash_file
from latentforge.runtime.manifest import FileEntry, Manifest

onnx = pytest.importorskip("onnx")


def weights(location: str) -> Any:
    tensor = onnx.numpy_helper.from_array(np.ones(2, np.float32), "weights")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def sparse(location: str) -> Any:
    indices = onnx.numpy_helper.from_array(np.arange(2), "indices")
    return onnx.helper.make_sparse_tensor(weights(location), indices, [4])


def branch(location: str) -> Any:
    graph = onnx.helper.make_graph([], "branch", [], [], [weights(location)])
    return onnx.helper.make_node("If", ["x"], ["y"], then_branch=graph, else_branch=graph)


def node(location: str, kind: str) -> Any:
    values = {"tensor": weights, "sparse": sparse}
    if kind in values:
        return onnx.helper.make_node("Constant", [], ["y"], value=values[kind](location))
    name = f"{kind}_values"
    return onnx.helper.make_node("Other", [], ["y"], **{name: [values[kind[:-1]](location)] * 2})


def place(model: Any, kind: str, location: str) -> None:
    """Add a reference to an external file to a model, in a place of a kind."""
    graph = model.graph
    match kind:
        case "initializer":
            graph.initializer.append(weights(location))
        case "sparse initializer":
            graph.sparse_initializer.append(sparse(location))
        case "subgraph":
            graph.node.append(branch(location))
        case "function":
            model.functions.add(name="f", domain="d").node.append(branch(location))
        case "training":
            model.training_info.add().initialization.initializer.append(weights(location))
        case "settings":
            model.metadata_props.add(key="ort_config", value="{}")
        case "engine":
            graph.node.append(onnx.helper.make_node("EPContext", [], [], ep_cache_context="e"))
        case _:
            graph.node.append(node(location, kind))


KINDS = (
    *("initializer", "sparse initializer", "subgraph", "function", "training", "settings"),
    *("engine", "tensor", "sparse", "tensors", "sparses"),
)

NEVER = {
    **{"settings": "names the file", "engine": "names the file", "function": "defines functions"},
    **dict.fromkeys(("sparse initializer", "sparse", "sparses"), "a sparse tensor"),
}
"""Kinds that are refused even where the file is listed."""


@pytest.fixture
def placed(handmade: Handmade) -> Callable[[str, str], Path]:
    """A function that adds a reference to an external file, and keeps the hashes in agreement."""
    engines = handmade()

    def add(kind: str, location: str) -> Path:
        path = engines / "denoiser.onnx"
        model = onnx.ModelProto(ir_version=9)
        place(model, kind, location)
        path.write_bytes(model.SerializeToString())
        (engines / "weights").write_bytes(bytes(8))
        describe(engines)
        return engines

    return add


def describe(engines: Path, *data: str) -> None:
    """Write the present hash of the denoiser, and these files as its data."""
    content = msgspec.json.decode((engines / "manifest.json").read_bytes())
    path = engines / "denoiser.onnx"
    entries = [msgspec.to_builtins(FileEntry.of(engines / name, engines)) for name in data]
    content["components"]["denoiser"] |= {
        "sha256": hash_file(path),
        "bytes": path.stat().st_size,
        "data": entries,
    }
    (engines / "manifest.json").write_bytes(msgspec.json.encode(content))


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_a_file_that_is_not_listed(placed: Callable[..., Path], kind: str) -> None:
    engines, unlisted = placed(kind, "weights"), "names the file '.*', which the manifest"
    for hashes in (True, False):
        with pytest.raises(ManifestError, match=NEVER.get(kind, unlisted)):
            Manifest.read(engines, hashes=hashes)
    describe(engines, "weights")
    if kind in NEVER:
        with pytest.raises(ManifestError, match=NEVER[kind]):
            Manifest.read(engines)
    else:
        Manifest.read(engines)


LOCATIONS = (
    *("/etc/passwd", "../weights", "sub/../weights", "", "*/_ORT_MEM_ADDR_/*", "weights "),
    *("w" * 5000, "weights\0", "file:weights", "\x1b[31m"),
)


@pytest.mark.parametrize("location", LOCATIONS)
def test_refuses_other_paths(placed: Callable[..., Path], location: str) -> None:
    engines = placed("initializer", location)
    describe(engines, "weights")
    with pytest.raises(ManifestError) as caught:
        Manifest.read(engines)
    assert str(caught.value).isprintable()


def test_the_last_of_several_locations_is_not_the_only_one(placed: Callable[..., Path]) -> None:
    engines = placed("initializer", "weights")
    model = onnx.load(engines / "denoiser.onnx", load_external_data=False)
    model.graph.initializer[0].external_data.add(key="location", value="../other")
    (engines / "denoiser.onnx").write_bytes(model.SerializeToString())
    describe(engines, "weights")
    with pytest.raises(ManifestError, match="other"):
        Manifest.read(engines)


HIDDEN = {
    "a field number of more than 32 bits": b"\xba\x80\x80\x80\x80\x01\x0a\x00\x0alocation  ",
    "a group": b"\x0b\x0c" + b"location",
    "a length beyond the end": b"\x3a\x7f" + b"location",
    "a number of 11 bytes": b"\x80" * 11 + b"location",
    "nested messages": b"location" * 3,
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_refuses_what_libraries_may_read_in_another_way(handmade: Handmade, kind: str) -> None:
    engines = handmade()
    (engines / "denoiser.onnx").write_bytes(HIDDEN[kind])
    describe(engines)
    with pytest.raises(ManifestError, match="no ONNX graph"):
        Manifest.read(engines)


def length(size: int) -> bytes:
    return bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])


def test_a_graph_nested_too_deeply(handmade: Handmade) -> None:
    engines, content = handmade(), b"\x2a\x0alocation12"
    for _ in range(200):
        for number in (b"\x32", b"\x2a", b"\x0a"):  # a graph in an attribute of a node
            size = len(content)
            content = (
                number + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + content
            )
            content = b"\x22\x02If" * (number == b"\x2a") + content
    size = len(content)
    prefix = b"\x3a" + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    (engines / "denoiser.onnx").write_bytes(prefix + content)
    describe(engines)
    with pytest.raises(ManifestError, match="nested too deeply"):
        Manifest.read(engines)


def test_onnxruntime_reads_onnx_files_alone(handmade: Handmade) -> None:
    engines = handmade()
    (engines / "denoiser.onnx").rename(engines / "denoiser.ort")
    content = msgspec.json.decode((engines / "manifest.json").read_bytes())
    content["components"]["denoiser"] |= {"file": "denoiser.ort", "backend": "onnxruntime"}
    (engines / "manifest.json").write_bytes(msgspec.json.encode(content))
    with pytest.raises(ManifestError, match="does not end in .onnx"):
        Manifest.read(engines)
