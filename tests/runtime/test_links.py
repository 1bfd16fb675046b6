"""Engine directories as a hub's cache lays them out: files are links to blobs named by hash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from conftest import Handmade

pytest.importorskip("onnx_ir")
import onnx
import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.graph_io import load_graph, save_graph
from latentforge.runtime.backends import unlinked_graph
from latentforge.runtime.files import hash_file
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import FileEntry, Manifest

DENOISER = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, latent_height, latent_width] sample, float[1] timestep,
   float[batch, 8, 2] encoder_hidden_states)
  => (float[batch, 4, latent_height, latent_width] out_sample)
<float[4, 4, 1, 1] weight = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
{
  mixed = Conv<kernel_shape = [1, 1]>(sample, weight)
  mean = ReduceMean<axes = [1, 2], keepdims = 1>(encoder_hidden_states)
  axis = Constant<value = int64[1] {3}>()
  bias = Unsqueeze(mean, axis)
  step = Tanh(timestep)
  moved = Add(mixed, bias)
  out_sample = Mul(moved, step)
}"""


def with_weights_beside(engines: Path, folder: str) -> Path:
    """Move the denoiser's weight to a file in a folder beside the graph."""
    path = engines / "denoiser.onnx"
    (engines / folder).mkdir(exist_ok=True)
    data = engines / folder / "denoiser.onnx.data"
    ir.save(ir.load(path), path, external_data=data.relative_to(engines), size_threshold_bytes=8)
    content = msgspec.json.decode((engines / "manifest.json").read_bytes())
    entry = content["components"]["denoiser"]
    entry |= msgspec.to_builtins(FileEntry.of(path, engines))
    entry["data"] = [msgspec.to_builtins(FileEntry.of(data, engines))]
    (engines / "manifest.json").write_bytes(msgspec.json.encode(content))
    return engines


def as_in_a_hub(engines: Path, place: Path) -> Path:
    """Copy a directory to place/blobs, and return a snapshot of links to it."""
    snapshot, blobs = place / "snapshots" / "abc", place / "blobs"
    blobs.mkdir(parents=True)
    for path in filter(Path.is_file, engines.rglob("*")):
        blob = blobs / hash_file(path)
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(engines)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture(params=[".", "weights"])
def snapshot(handmade: Handmade, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    engines = handmade(onnx={"denoiser": DENOISER})
    return as_in_a_hub(with_weights_beside(engines, request.param), tmp_path / "hub")


def links(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink()]


def test_runs(snapshot: Path) -> None:
    with load(snapshot) as pipeline:
        pipeline("a red apple", steps=1)


def test_a_graph_is_read_and_written(snapshot: Path, tmp_path: Path) -> None:
    component = Manifest.read(snapshot).components["denoiser"]
    model = load_graph("denoiser", component, snapshot)
    save_graph(model, tmp_path / "m.onnx")
    weight = constant(model.graph.initializers["weight"])
    assert weight is not None and weight.sum() == 4
    assert onnx.load(tmp_path / "m.onnx").graph.initializer[0].raw_data == weight.tobytes()


def test_a_graph_whose_weights_have_several_hard_links(snapshot: Path, tmp_path: Path) -> None:
    component = Manifest.read(snapshot).components["denoiser"]
    os.link(snapshot / component.data[0].file, tmp_path / "another")
    os.link((snapshot / component.data[0].file).resolve(), tmp_path / "further")
    model = load_graph("denoiser", component, snapshot)
    weight = constant(model.graph.initializers["weight"])
    assert weight is not None and weight.sum() == 4


@pytest.mark.parametrize("linked", [True, False])
def test_a_graph_without_links(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    if not linked:  # as on another file system

        def refuse(*_: object) -> None:
            raise OSError

        monkeypatch.setattr(os, "link", refuse)
    component = Manifest.read(snapshot).components["denoiser"]
    place = tmp_path / "place"
    place.mkdir()
    with unlinked_graph(snapshot / component.file, component, place) as graph:
        assert not links(place)
        names = {file.name: file.read_bytes() for file in place.rglob("*.onnx*")}
        assert names == {n: next(snapshot.rglob(n)).read_bytes() for n in names} and len(names) == 2
        with unlinked_graph(graph, component, place) as same:
            assert same == graph
    assert not list(place.iterdir())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_compiles(snapshot: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    options = ["--backend", "null", "--backend", f"denoiser={backend}"]
    command = [sys.executable, "-m", "latentforge", "compile", str(snapshot), "made", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not links(tmp_path / "made")
    shutil.rmtree(snapshot.parents[1])
    with load(tmp_path / "made") as pipeline:
        pipeline("a red apple", steps=1)


def test_engines_of_links_run_after_compiling(handmade: Handmade, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    engines = handmade(onnx={"denoiser": DENOISER})
    command = [sys.executable, "-m", "latentforge", "compile", str(engines), "made"]
    subprocess.run(
        [*command, "--backend", "null", "--backend", "denoiser=openvino"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    with load(as_in_a_hub(tmp_path / "made", tmp_path / "hub")) as pipeline:
        pipeline("a red apple", steps=1)
