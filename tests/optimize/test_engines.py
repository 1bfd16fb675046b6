"""Graphs for other backends load there: engines are built, and run where that needs no GPU.

TensorRT-RTX builds engines without a GPU, from the same graphs as TensorRT.
"""

import gc
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tiers import further

from latentforge.optimize import graph_io
from latentforge.optimize.graph_io import (
    DENOISER,
    free_graphs,
    load_graph,
    save_graph,
    weight_files,
)
from latentforge.optimize.recipe import Recipe, read_recipe
from latentforge.optimize.recording import CallRecording, RecordingRequest, record
from latentforge.optimize.stage.component import Rewriter, save_part
from latentforge.optimize.targets import TARGETS
from latentforge.runtime import backends
from latentforge.runtime.manifest import Component, Manifest
from latentforge.runtime.progress import Progress
from latentforge.runtime.shapes import Range, Sizes

Array = np.ndarray[Any, Any]
Arrays: TypeAlias = Mapping[str, Array]
Engines: TypeAlias = Mapping[str, tuple[Path, Component]]
Run = Callable[[Path, Arrays], dict[str, Array]]

RECIPES = {
    **{name: read_recipe(name) for name in ("fp32", "fp16", "int8", "int8-weights")},
    "int4-weights": Recipe(summary="", precision={"default": "int4-weights"}),
    "uncut": Recipe(summary="", hoist_invariants=False),
}
BOUNDS = {
    **{"fp32": 1e-5, "uncut": 1e-5, "fp16": 2e-3},
    **{"int8": 0.1, "int8-weights": 0.05, "int4-weights": 0.25},
}
"""Upper bound of the relative error to the export, by recipe, in ONNX Runtime."""
CASES = [
    *(("text_encoder", recipe) for recipe in ("fp32", "int8-weights")),
    *further(("text_encoder", "fp16"), ("text_encoder", "int4-weights")),
    *(("denoiser", recipe) for recipe in ("fp16", "int8")),
    *further(("denoiser", "uncut"), ("denoiser", "int4-weights")),
    *(("vae_decoder", recipe) for recipe in ("fp16", "int8-weights")),
    *further(("vae_encoder", "fp16"), ("vae_encoder", "int8-weights")),
]
"""Components and recipes: each kind of layer once in each precision that exists for it."""
CAPABILITY = "8.6"
SIDE = (Range(16, 32, 64),)  # in pixels
SIZES = Sizes(height=SIDE, width=SIDE, batch=(Range(1, 2, 4),))


@pytest.fixture(scope="module")
def recording(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> CallRecording:
    """Inputs and outputs of every component in a short run."""
    with Progress(1, quiet=True) as progress:
        request = RecordingRequest(prompts=("red apple",), settings={"steps": 2, "sampler": "ddim"})
        return record(tiny_engines, request, tmp_path_factory.mktemp("recording"), progress, "")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc is Linux's")
def test_freed_graphs_leave_no_file_mapped(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_io, "_EXTERNAL", 0)
    component = Manifest.read(tiny_engines).components[DENOISER]
    save_graph(load_graph(DENOISER, component, tiny_engines), tmp_path / component.file)
    gc.disable()
    try:
        model = load_graph(DENOISER, component, tmp_path)
        weights = weight_files(model)
        arrays = [tensor.numpy() for tensor in weights]
        assert arrays
        kept = arrays[0].copy()
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
        free_graphs(weights)  # though the graph is still referred to, and an array is in use
        assert np.array_equal(arrays[0], kept)
        del arrays
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def engines(
    tiny_engines: Path, recording: CallRecording, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], Engines]:
    """Function that writes the parts of a component for a target and a recipe."""
    manifest = Manifest.read(tiny_engines)

    @cache
    def written(target: str, recipe: str, name: str) -> Engines:
        folder = tmp_path_factory.mktemp(f"{target}-{recipe}-{name}")
        component = manifest.components[name]
        feeds = {DENOISER: recording.feeds(DENOISER)}
        rewriter = Rewriter(recipe=RECIPES[recipe], target=TARGETS[target], feeds=feeds)
        model = load_graph(name, component, tiny_engines)
        result = rewriter.rewrite(name, model, component)
        parts = {key: part for key, part in result.parts.items() if part is not None}
        saved = {key: save_part(key, part, component, folder) for key, part in parts.items()}
        return {key: (folder / part.file, part) for key, part in saved.items()}

    return written


def by_onnxruntime(path: Path, feeds: Arrays) -> dict[str, Array]:
    session = ort.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def by_openvino(path: Path, feeds: Arrays) -> dict[str, Array]:
    core = pytest.importorskip("openvino").Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(dict(feeds))
    return {output.get_any_name(): np.asarray(results[output]) for output in compiled.outputs}


def run_parts(run: Run, engines: Engines, feeds: Arrays) -> Array:
    """Run the parts of a component in order and return the first output of the last."""
    values, outputs = dict(feeds), dict[str, Array]()
    for path, part in engines.values():
        outputs = run(path, {name: values[name] for name in part.inputs})
        values |= outputs
    return next(iter(outputs.values()))


def error(output: Array, reference: Array) -> float:
    """Return the relative error in the Euclidean norm."""
    return float(np.linalg.norm(output - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_openvino_is_as_close_to_the_export_as_onnxruntime(
    name: str,
    recipe: str,
    engines: Callable[[str, str, str], Engines],
    recording: CallRecording,
) -> None:
    """Quantized layers round differently in the two, by no more than the rounding itself."""
    pytest.importorskip("openvino")
    parts, call = engines("openvino", recipe, name), recording.calls[name][0]
    reference = next(iter(call.outputs.values()))
    openvino, onnxruntime = (
        error(run_parts(run, parts, call.feeds), reference) for run in (by_openvino, by_onnxruntime)
    )
    assert onnxruntime < BOUNDS[recipe]
    assert openvino < 1.2 * onnxruntime + 1e-5


def build(path: Path, part: Component) -> bytes:
    """Build the TensorRT-RTX engine of a graph and return its bytes."""
    shapes = SIZES.shapes(part.free_dimensions, downscale=2, rows=Range(1, 2, 50))
    component = msgspec.structs.replace(part.specialize(shapes), backend="tensorrt-rtx")
    target = path.with_suffix(".engine")
    options = {"capabilities": CAPABILITY}
    device = backends.get("tensorrt-rtx").compile(path, target, component, options, no_report)
    assert device["compute capability"] == CAPABILITY
    return target.read_bytes()


def no_report(what: str, done: int, total: int) -> None:
    """Ignore the progress of a build."""


@pytest.fixture(scope="module")
def plans(engines: Callable[[str, str, str], Engines]) -> Callable[[str, str], list[bytes]]:
    """Function that builds the TensorRT-RTX engines of a component's parts for a recipe."""
    pytest.importorskip("tensorrt_rtx")

    @cache
    def built(recipe: str, name: str) -> list[bytes]:
        parts = engines("tensorrt-rtx", recipe, name)
        return [build(path, part) for path, part in parts.values()]

    return built


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_tensorrt_builds_an_engine(
    name: str, recipe: str, plans: Callable[[str, str], list[bytes]]
) -> None:
    assert all(plans(recipe, name))


def operands(plan: bytes, operator: str) -> list[str]:
    """Return the dtype of the first operand of each such operator, from an engine's listing."""
    dtypes: dict[bytes, bytes] = {}
    for name, dtype in re.findall(rb'tensor=\{[^\n]*?name="([^"]+)"[^\n]*?type=(\w+)', plan):
        dtypes.setdefault(name, dtype)
    pattern = rb'\b%s=\{ name=[^\n]*? input=\{"([^"]+)"' % operator.encode()
    return [dtypes[name].decode() for name in re.findall(pattern, plan)]


def test_tensorrt_computes_in_8_bits(
    plans: Callable[[str, str], list[bytes]], engines: Callable[[str, str, str], Engines]
) -> None:
    """TensorRT builds an engine from Q and DQ it cannot fuse too, which computes in half then."""
    plan = plans("int8", DENOISER)[-1]
    graph = ir.load(engines("tensorrt-rtx", "int8", DENOISER)[DENOISER][0]).graph
    convs = [node.inputs[0] for node in graph if node.op_type == "Conv"]
    producers = [value.producer() for value in convs if value is not None]
    quantized = sum(node is not None and node.op_type == "DequantizeLinear" for node in producers)
    assert operands(plan, "corrltn").count("int8") == quantized > 0
    assert set(operands(plan, "fully_connected")) == {"int8"}
