"""Each target's graph loads where its backend can run here, and computes what the export does."""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from cuda_operators import OPERATORS
from onnx.reference import ReferenceEvaluator

from latentforge.optimize.passes import CUDA_ONLY, NATIVE, PASSES
from latentforge.optimize.passes.matching import MICROSOFT
from latentforge.optimize.passes.runner import optimize
from latentforge.optimize.targets import TARGETS
from latentforge.runtime.kernels import library

Array = np.ndarray[Any, Any]

COMPONENTS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")
SIZES = {"batch": 2, "latent_height": 8, "latent_width": 8, "height": 16, "width": 16}


def inputs(model: ir.Model) -> dict[str, Array]:
    """Return random inputs for a component."""
    rng, feeds = np.random.default_rng(0), {}
    for value in model.graph.inputs:
        shape = [SIZES.get(str(axis), axis) for axis in value.shape or ()]
        ids = value.dtype == ir.DataType.INT64
        drawn = rng.integers(0, 99, shape) if ids else rng.standard_normal(shape)
        feeds[str(value.name)] = drawn.astype(value.dtype.numpy() if value.dtype else np.float32)
    return feeds


def by_onnxruntime(model: ir.Model, feeds: Mapping[str, Array]) -> Array:
    options = ort.SessionOptions()
    if (native := library()) is not None:
        options.register_custom_ops_library(str(native))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return np.asarray(session.run(None, dict(feeds))[0])


@pytest.fixture(params=COMPONENTS)
def component(request: pytest.FixtureRequest, tiny_engines: Path) -> Path:
    return tiny_engines / f"{request.param}.onnx"


@cache
def fused(component: Path, target: str, portable: bool) -> tuple[bytes, Counter[str]]:
    """Return the serialized graph of a component for a target, and the rewrites by pass."""
    model = ir.load(component)
    names = TARGETS[target].portable_passes if portable else TARGETS[target].passes
    counts = optimize(model, {name: PASSES[name] for name in names})
    counts += optimize(
        model, {name: PASSES[name] for name in TARGETS[target].post_partition_passes}
    )
    return ir.to_proto(model).SerializeToString(), counts


def graph(component: Path, target: str, *, portable: bool = False) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(fused(component, target, portable)[0]))


def compare(output: Array, component: Path) -> None:
    """Check that an output is that of the export."""
    model = ir.load(component)
    reference = by_onnxruntime(model, inputs(model))
    np.testing.assert_allclose(output, reference, atol=2e-5 * np.abs(reference).max())


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_portable_variant_runs_on_a_cpu(target: str, component: Path) -> None:
    model = graph(component, target, portable=True)
    assert len(model.graph) < len(ir.load(component).graph)
    compare(by_onnxruntime(model, inputs(model)), component)


def test_the_cpu_graph_has_every_attention_in_one_node(component: Path) -> None:
    softmaxes = sum(node.op_type == "Softmax" for node in ir.load(component).graph)
    model = graph(component, "cpu", portable=True)
    fused = ("MultiHeadAttention", "Attention")  # com.microsoft's, or latentforge's
    assert sum(node.op_type in fused for node in model.graph) == softmaxes > 0
    assert not any(node.op_type == "Softmax" for node in model.graph)


@pytest.mark.skipif(library() is None, reason="the library was not compiled here")
def test_the_cpu_graph_transposes_nothing_between_its_ends(component: Path) -> None:
    counts, model = fused(component, "cpu", False)[1], graph(component, "cpu")
    images = any(node.op_type == "Conv" for node in ir.load(component).graph)
    assert bool(counts["native-conv"]) == bool(counts["fuse-conv"]) == images
    transposes = [node for node in model.graph if node.op_type == "Transpose"]
    assert len(transposes) == 2 * images
    left = {node.op_type for node in model.graph if node.domain == ""}
    assert not left & {"Conv", "InstanceNormalization", "Resize", "Split"}


def test_the_cuda_graph_computes_what_the_export_does(component: Path) -> None:
    counts = fused(component, "cuda", False)[1]
    assert counts["pack-attention"] == counts["fuse-attention"] > 0
    model = graph(component, "cuda")
    left = {node.op_type for node in model.graph}
    assert not left & {"Conv", "InstanceNormalization", "Softmax", "Sigmoid"}
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=OPERATORS)
    compare(np.asarray(evaluator.run(None, inputs(model))[0]), component)


def test_other_backends_get_standard_operators_only(component: Path) -> None:
    assert TARGETS["tensorrt"].passes == TARGETS["tensorrt-rtx"].passes
    assert TARGETS["tensorrt"].passes == TARGETS["openvino"].passes
    model = graph(component, "openvino")
    assert {node.domain for node in model.graph} == {""}
    assert MICROSOFT not in model.graph.opset_imports


def test_openvino_runs_its_graph(component: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = graph(component, "openvino")
    ir.save(model, tmp_path / "m.onnx")
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    compare(np.asarray(compiled(inputs(model))[0]), component)


def test_targets_name_passes() -> None:
    for target in TARGETS.values():
        assert {*target.passes, *target.post_partition_passes} <= set(PASSES)
        assert not NATIVE & set(target.passes)
        assert not CUDA_ONLY & set(target.portable_passes)
    assert set(PASSES) > CUDA_ONLY


def test_folders_say_who_runs_a_pass() -> None:
    """A pass whose result the CPU provider cannot load stands in ort_cuda; see the tests above."""
    assert {"fuse-geglu", "fuse-group-norm", "pack-attention", "nhwc-conv"} == CUDA_ONLY
    assert {name for name in PASSES if name.startswith("native-")} | {"fuse-conv"} == NATIVE


def test_properties_of_targets() -> None:
    cpu, cuda, tensorrt = (TARGETS[name] for name in ("cpu", "cuda", "tensorrt"))
    assert cpu.runs_on_cpu and cpu.source_backend == "onnxruntime" and not cpu.needs_compile
    assert not cuda.runs_on_cpu and cuda.source_backend == "onnxruntime-cuda"
    assert not cuda.needs_compile
    assert tensorrt.source_backend == "onnxruntime" and tensorrt.needs_compile
