"""bfloat16: which weights are in it, what stays in float32, and where it is refused or measured."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common

from latentforge.measure.equivalence import engine_psnr
from latentforge.optimize import targets
from latentforge.optimize.half import compute_bf16, stored_precision
from latentforge.optimize.passes import PASSES
from latentforge.optimize.passes.runner import optimize
from latentforge.optimize.stage.job import check_request, recipes_of
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.targets import TARGETS
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.kernels import InstructionSets, library

built = pytest.mark.skipif(library() is None, reason="the library was not compiled here")

UNET = """<ir_version: 10, opset_import: ["" : 20]>
m (float[1,40,8,8] sample, float[1,24] timestep, float[24,40] t, float[48,40,3,3] c, float[48] b,
   float[48,48] p, float[48] bias) => (float[1,64,48] out)
<int64[4] wide = {1, 40, 1, 1}, int64[3] flat = {1, 48, 64}>
{
  time = MatMul(timestep, t)
  shift = Reshape(time, wide)
  moved = Add(sample, shift)
  conv = Conv <pads = [1, 1, 1, 1]> (moved, c, b)
  rows = Reshape(conv, flat)
  tokens = Transpose <perm = [0, 2, 1]> (rows)
  product = MatMul(tokens, p)
  out = Add(product, bias)
}"""


def unet() -> ir.Model:
    """Return a graph with a time path, a convolution and a product, by latentforge's operators."""
    model, rng = ir.from_onnx_text(UNET), np.random.default_rng(0)
    for value in model.graph.inputs[2:]:
        array = rng.standard_normal(value.shape.numpy()) / 20  # type: ignore[union-attr]
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    common.ShapeInferencePass()(model)
    native = ("native-conv", "merge-transposes", "fuse-conv", "native-product")
    optimize(model, {name: PASSES[name] for name in native})
    return model


def run(model: ir.Model) -> np.ndarray:
    rng, options = np.random.default_rng(1), ort.SessionOptions()
    options.register_custom_ops_library(str(library()))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    shapes = {"sample": (1, 40, 8, 8), "timestep": (1, 24)}
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return np.asarray(session.run(["out"], feeds)[0])


def dtypes(model: ir.Model) -> dict[str, str]:
    return {str(name): str(value.dtype) for name, value in model.graph.initializers.items()}


@built
def test_products_have_weights_in_bfloat16_except_for_the_time_path() -> None:
    reference, model = run(unet()), unet()
    assert compute_bf16(model) == 2
    found = dtypes(model)
    assert found["c/packed"] == found["p/packed"] == "BFLOAT16"
    assert found["t/packed"] == found["b"] == found["bias"] == "FLOAT"
    error = np.linalg.norm(run(model) - reference) / np.linalg.norm(reference)
    assert 1e-4 < error < 5e-3  # each number of 8 bits is off by 0.1 % on average
    assert compute_bf16(model) == 0


def test_a_weight_with_another_use_stays_in_float32() -> None:
    model = unet()
    packed = model.graph.initializers["p/packed"]
    model.graph.append(ir.node("Identity", [packed]))
    assert compute_bf16(model) == 1
    assert dtypes(model)["p/packed"] == "FLOAT"


def test_a_graph_without_such_products_is_not_called_bf16() -> None:
    model = unet()
    assert stored_precision(model, "bf16") == "fp16"
    compute_bf16(model)
    assert stored_precision(model, "bf16") == "bf16"
    assert stored_precision(model, "int8") == "int8"


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        ("openvino", "by --option precision=bf16"),
        ("cuda", "take fp16"),
        ("tensorrt", "take fp16"),
        ("cpu", "run python -m latentforge.runtime.kernels"),
    ],
)
def test_bf16_is_refused_where_nothing_computes_in_it(
    target: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {**TARGETS, "cpu": replace(TARGETS["cpu"], bf16=False)}
    for module in ("optimize.targets", "optimize.stage.job"):
        monkeypatch.setattr(f"latentforge.{module}.TARGETS", lacking)
    with pytest.raises(SettingsError, match=f"recipe bf16: bf16 is not built for {target}") as told:
        check_request(OptimizeRequest(recipe="bf16", target=target))
    assert remedy in str(told.value)


@built
@pytest.mark.parametrize(("used", "measured"), [("amx", True), ("avx512", False)])
def test_auto_measures_bf16_where_the_machine_multiplies_it(
    used: str, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = InstructionSets(used=used, supported=(used,), compiled=(used,))
    monkeypatch.setattr("latentforge.optimize.stage.job.instruction_sets", lambda: sets)
    assert ("bf16" in recipes_of(OptimizeRequest(recipe="auto"))) == measured
    assert "bf16" not in recipes_of(OptimizeRequest(recipe="auto", target="openvino"))
    assert "bf16" in recipes_of(OptimizeRequest(recipe="bf16"))
    assert targets.TARGETS["cpu"].bf16


def test_images_of_mixed_engines_are_compared_as_their_lowest_precision() -> None:
    assert engine_psnr("bf16, fp16") == engine_psnr("bf16") == engine_psnr("fp32, fp16") == 30
    assert engine_psnr("fp32") == engine_psnr("fp32, convolutions fp16") == engine_psnr("") == 40
