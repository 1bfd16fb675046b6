"""Half precision shrinks files, keeps unsafe operators in float32, and costs little accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from latentforge.optimize.half import compute_half, store_half
from latentforge.runtime.errors import SettingsError

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1, "other" : 1]>\n'
RNG = np.random.default_rng(0)

RESNET = """m (float[2,8,8,8] sample, float[1] timestep, float[8,8,3,3] w, float[8] b,
  float[8,16] frequencies, float[2] ones, float[2] zeros, float[8,1,1] gamma, float[8,1,1] beta)
  => (float[2,8,8,8] out)
<int64[3] groups = {0, 2, -1}, int64[4] back = {2, 8, 8, 8}, int64[4] spread = {1, 8, 1, 1},
 int64[2] column = {1, 1}, int64[2] wide = {1, 16}>
{
  t = Reshape(timestep, column)
  phases = Expand(t, wide)
  sines = Sin(phases)
  time = Gemm <transB = 1> (sines, frequencies)
  shift = Reshape(time, spread)
  grouped = Reshape(sample, groups)
  normal = InstanceNormalization(grouped, ones, zeros)
  restored = Reshape(normal, back)
  scaled = Mul(restored, gamma)
  shifted = Add(scaled, beta)
  gate = Sigmoid(shifted)
  silu = Mul(shifted, gate)
  conv = Conv <pads = [1, 1, 1, 1]> (silu, w, b)
  moved = Add(conv, shift)
  out = Add(sample, moved)
}"""


def build(text: str, **weights: np.ndarray) -> ir.Model:
    """Parse ONNX text, in which the named inputs become weights."""
    model = ir.from_onnx_text(HEADER + text)
    values = {value.name: value for value in model.graph.inputs}
    for name, array in weights.items():
        values[name].const_value = ir.tensor(array, name=name)
        model.graph.inputs.remove(values[name])
        model.graph.register_initializer(values[name])
    for node in model.graph:
        node.name = f"{node.outputs[0].name}/{node.op_type}"
    return model


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Save and check a model, with strict type inference, and return its first output."""
    path = folder / "m.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    return np.asarray(ort.InferenceSession(path).run(None, feeds)[0])


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def kinds(model: ir.Model) -> dict[str, str]:
    """Return the dtype of each node's first output, by the output's name."""
    return {str(n.outputs[0].name): str(n.outputs[0].dtype) for n in model.graph}


def check_casts(model: ir.Model) -> None:
    """Check that no constant and no Cast is cast, and no value twice."""
    casts = [node for node in model.graph if node.op_type == "Cast"]
    sources = [node.inputs[0] for node in casts]
    assert len(set(sources)) == len(sources)
    for value in sources:
        assert value is not None and not value.is_initializer()
        assert value.producer() not in casts


def error(output: np.ndarray, reference: np.ndarray) -> float:
    """Return the relative error in the Euclidean norm."""
    return float(np.linalg.norm(output - reference) / np.linalg.norm(reference))


def resnet() -> ir.Model:
    return build(
        RESNET,
        w=normal(8, 8, 3, 3, scale=0.1),
        b=normal(8),
        frequencies=normal(8, 16),
        ones=np.ones(2, np.float32),
        zeros=np.zeros(2, np.float32),
        gamma=normal(8, 1, 1),
        beta=normal(8, 1, 1),
    )


TWICE = """m (float[3,64] x, float[64,64] w) => (float[3,64] y)
{ a = MatMul(x, w)  b = Tanh(a)  y = MatMul(b, w) }"""


def test_a_weight_is_stored_once_and_used_in_float(tmp_path: Path) -> None:
    weight, x = normal(64, 64), normal(3, 64)
    rounded = weight.astype(np.float16).astype(np.float32)
    reference = run(build(TWICE, w=rounded), tmp_path, {"x": x})
    model = build(TWICE, w=weight)
    assert store_half(model) == 1
    assert operators(model) == ["Cast", "MatMul", "Tanh", "MatMul"]
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(run(model, tmp_path, {"x": x}), reference)
    assert (tmp_path / "m.onnx").stat().st_size < 0.55 * weight.nbytes
    assert store_half(model) == 0


def test_the_cast_is_folded_when_the_file_is_loaded(tmp_path: Path) -> None:
    model = build(TWICE, w=normal(64, 64))
    store_half(model)
    ir.save(model, tmp_path / "m.onnx")
    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(tmp_path / "m.onnx", settings)
    assert operators(ir.load(tmp_path / "loaded.onnx")) == ["MatMul", "Tanh", "MatMul"]


def test_external_weights_stay_on_disk_until_they_are_written(tmp_path: Path) -> None:
    weight, x = normal(64, 64), normal(3, 64)
    ir.save(build(TWICE, w=weight), tmp_path / "source.onnx", external_data="source.data")
    model = ir.load(tmp_path / "source.onnx")
    assert store_half(model) == 1
    assert isinstance(model.graph.initializers["w"].const_value, ir.LazyTensor)
    ir.save(model, tmp_path / "stored.onnx", external_data="stored.data")
    assert (tmp_path / "stored.data").stat().st_size == weight.nbytes // 2
    output = ort.InferenceSession(tmp_path / "stored.onnx").run(None, {"x": x})[0]
    assert error(output, np.tanh(x @ weight) @ weight) < 2e-3


@pytest.mark.parametrize(
    ("weight", "stored"),
    [
        (normal(64, 64), 1),
        (np.where(np.eye(64), 7e4, 1).astype(np.float32), 0),  # beyond the largest
        (normal(64, 64, scale=1e-7), 0),  # mostly below the smallest
        (
            np.where(np.eye(64), 1, normal(64, 64, scale=1e-7)).astype(np.float32),
            1,
        ),  # what is large matters
        (normal(64, 8), 0),  # too small to save anything
    ],
)
def test_weights_that_half_cannot_represent_stay_in_float(weight: np.ndarray, stored: int) -> None:
    columns = weight.shape[1]
    text = f"""m (float[3,64] x, float[64,{columns}] w) => (float[3,{columns}] y)
    {{ y = MatMul(x, w) }}"""
    assert store_half(build(text, w=weight)) == stored


def test_scales_inside_quantized_operators_stay() -> None:
    text = """m (uint8[3,64] x, int8[64,1024] q, float[1024] s) => (float[3,1024] y)
    <float step = {0.1}>
    { y = com.microsoft.MatMulIntegerToFloat(x, q, step, s) }"""
    weights: dict[str, Any] = {"q": np.ones((64, 1024), np.int8), "s": np.ones(1024, np.float32)}
    assert store_half(build(text, **weights)) == 0


def test_scales_of_quantized_layers_stay_in_float_and_other_weights_do_not(tmp_path: Path) -> None:
    text = """m (float[3,64] x, int8[64,1024] q, float[1024] s, float[1024,64] w) => (float[3,64] y)
    { d = DequantizeLinear <axis = 1> (q, s)  a = MatMul(x, d)  y = MatMul(a, w) }"""
    weights: dict[str, Any] = {
        "q": RNG.integers(-127, 128, (64, 1024), np.int8),
        "s": RNG.uniform(0.001, 0.002, 1024).astype(np.float32),
        "w": normal(1024, 64),
    }
    x = normal(3, 64)
    reference = run(build(text, **weights), tmp_path, {"x": x})
    model = build(text, **weights)
    assert store_half(model) == 1
    assert model.graph.initializers["s"].dtype == ir.DataType.FLOAT
    assert 0 < error(run(model, tmp_path, {"x": x}), reference) < 1e-3


def test_a_resnet_computes_in_half_except_for_its_norm_and_time_path(tmp_path: Path) -> None:
    feeds = {"sample": normal(2, 8, 8, 8), "timestep": np.array([998.7], np.float32)}
    model = resnet()
    reference = run(model, tmp_path, feeds)
    assert compute_half(model) == 8
    dtypes = kinds(model)
    for name in ("t", "phases", "sines", "time", "shift", "grouped", "normal"):
        assert dtypes[name] == "FLOAT", name
    for name in ("scaled", "shifted", "gate", "silu", "conv", "moved", "out_half"):
        assert dtypes[name] == "FLOAT16", name
    assert str(model.graph.inputs[0].dtype) == str(model.graph.outputs[0].dtype) == "FLOAT"
    assert model.graph.outputs[0].name == "out"
    check_casts(model)
    # sample, shift, the norm's output and the graph's; the norm's input was never in half
    assert operators(model).count("Cast") == 4
    assert 0 < error(run(model, tmp_path, feeds), reference) < 2e-3


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    model = resnet()
    compute_half(model)
    before = operators(model)
    assert compute_half(model) == 0
    assert operators(model) == before


def test_weights_are_converted_and_not_stored_twice() -> None:
    model = resnet()
    compute_half(model)
    weights = {name: str(value.dtype) for name, value in model.graph.initializers.items()}
    assert weights["w"] == weights["b"] == weights["gamma"] == "FLOAT16"
    assert weights["frequencies"] == weights["ones"] == "FLOAT"
    assert "w_half" not in weights


def test_named_nodes_stay_in_float(tmp_path: Path) -> None:
    feeds = {"sample": normal(2, 8, 8, 8), "timestep": np.array([3.0], np.float32)}
    model = resnet()
    compute_half(model, keep=["conv/*", "silu/*"])
    dtypes = kinds(model)
    assert dtypes["conv"] == dtypes["silu"] == "FLOAT"
    assert dtypes["gate"] == "FLOAT16"
    check_casts(model)
    run(model, tmp_path, feeds)


@pytest.mark.parametrize("keep", [["a/*", "y/*"], ["a/*", "c/*", "y/*"]])
def test_nodes_that_move_data_between_floats_are_not_cast(
    keep: Sequence[str], tmp_path: Path
) -> None:
    text = """m (float[2,3,4] x) => (float[4,6] y)
    <int64[2] flat = {4, 6}>
    { a = Tanh(x)  b = Transpose <perm = [2, 0, 1]> (a)  c = Reshape(b, flat)  y = Tanh(c) }"""
    model = build(text)
    assert compute_half(model, keep=keep) == 0
    assert operators(model) == ["Tanh", "Transpose", "Reshape", "Tanh"]


def test_inputs_that_are_defined_for_float_only_stay(tmp_path: Path) -> None:
    text = """m (float[1,2,3,3] x) => (float[1,2,6,6] y)
    <float[4] scales = {1, 1, 2, 2}>
    { y = Resize <mode = "nearest"> (x, , scales) }"""
    model = build(text)
    x = normal(1, 2, 3, 3)
    assert compute_half(model) == 1
    assert model.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    np.testing.assert_allclose(
        run(model, tmp_path, {"x": x}), x.repeat(2, 2).repeat(2, 3), rtol=1e-3
    )


def test_norms_of_onnxruntime_take_half_and_float_weights() -> None:
    text = """m (float[1,4,4,8] x, float[8] gamma, float[8] beta) => (float[1,4,4,8] y)
    { a = Tanh(x)
      b = com.microsoft.GroupNorm <groups = 2, activation = 1, epsilon = 0.00001> (a, gamma, beta)
      y = Tanh(b) }"""
    model = build(text, gamma=normal(8), beta=normal(8))
    assert compute_half(model) == 3  # types of com.microsoft follow the first input
    assert kinds(model)["b"] == "FLOAT16"
    assert operators(model) == ["Cast", "Tanh", "GroupNorm", "Tanh", "Cast"]
    weights = model.graph.initializers
    assert weights["gamma"].dtype == weights["beta"].dtype == ir.DataType.FLOAT


def test_a_value_of_unknown_type_is_an_error() -> None:
    model = build("m (float[4] x) => (float[4] y) { a = other.Op(x)  y = Tanh(a) }")
    with pytest.raises(SettingsError, match="a/Op: the type of its output is not known"):
        compute_half(model)


def test_constants_beyond_half(tmp_path: Path) -> None:
    text = """m (float[4] x) => (float[4] y)
    <float low = {-3.4e38}, float large = {100000.0}, float tiny = {1e-12}, float zero = {0.0}>
    { c = Greater(x, zero)  masked = Where(c, x, low)  soft = Softmax(masked)
      added = Add(soft, tiny)  y = Mul(added, large) }"""
    x = np.array([1, -1, 2, 3], np.float32)
    model = build(text)
    reference = run(model, tmp_path, {"x": x})
    compute_half(model)
    dtypes = kinds(model)
    assert dtypes["masked"] == dtypes["soft"] == "FLOAT16"
    assert dtypes["added"] == dtypes["y"] == "FLOAT"
    low = model.graph.initializers["low"].const_value
    assert low is not None and low.numpy() == -65504
    np.testing.assert_allclose(run(model, tmp_path, {"x": x}), reference, rtol=2e-3)


QUANTIZED = """m (float[3,64] x, float[64] g, int8[64,32] q, float[32] s, float[64,32] w)
  => (float[3,32] y)
<float step = {0.03}, int8 zero = {0}>
{ n = LayerNormalization(x, g)
  i = QuantizeLinear(n, step, zero)
  d = DequantizeLinear(i, step, zero)
  u = DequantizeLinear <axis = 1> (q, s)
  a = MatMul(d, u)
  b = MatMul(n, w)
  y = Add(a, b) }"""


def test_quantized_layers_return_half_and_take_float_without_a_cast(tmp_path: Path) -> None:
    model = build(
        QUANTIZED,
        g=np.ones(64, np.float32),
        q=RNG.integers(-63, 64, (64, 32), np.int8),
        s=RNG.uniform(0.001, 0.002, 32).astype(np.float32),
        w=normal(64, 32),
    )
    x = normal(3, 64)
    reference = run(model, tmp_path, {"x": x})
    compute_half(model)
    dtypes = kinds(model)
    assert dtypes["d"] == dtypes["u"] == dtypes["a"] == "FLOAT16"
    assert dtypes["n"] == "FLOAT"
    quantize = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    assert quantize.inputs[0] is not None and quantize.inputs[0].name == "n"
    assert operators(model).count("Cast") == 2  # for the MatMul in float, and the output
    check_casts(model)
    assert 0 < error(run(model, tmp_path, {"x": x}), reference) < 3e-3


def users_of_large_weights(model: ir.Model) -> list[ir.Node]:
    """Return the nodes that use a large weight in float32."""
    weights = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    large = [v for v in weights if v.const_value is not None and v.const_value.size >= 1024]
    return [user for value in large for user in value.consumers()]


def feeds_for(model: ir.Model) -> dict[str, np.ndarray]:
    """Return random inputs for a component of the tiny checkpoint."""
    sizes = {"batch": 2, "latent_height": 16, "latent_width": 16, "height": 32, "width": 32}
    feeds = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape or ()]
        if value.dtype == ir.DataType.INT64:
            feeds[str(value.name)] = RNG.integers(0, 1000, shape)
        else:
            feeds[str(value.name)] = normal(*shape)
    if "timestep" in feeds:
        feeds["timestep"] = np.array([981.0], np.float32)
    return feeds


@pytest.mark.parametrize("name", ["text_encoder", "denoiser", "vae_decoder", "vae_encoder"])
def test_real_graphs(name: str, tiny_engines: Path, tmp_path: Path) -> None:
    model = ir.load(tiny_engines / f"{name}.onnx")
    feeds = feeds_for(model)
    reference = run(model, tmp_path, feeds)
    norms = sum("Normalization" in operator for operator in operators(model))
    time = sum(node.op_type == "Unsqueeze" for node in model.graph) if name == "denoiser" else 0
    compute_half(model)
    check_casts(model)
    assert operators(model).count("Cast") <= 2 * norms + time + 3
    assert 0 < error(run(model, tmp_path, feeds), reference) < 1e-2
    stored = {str(user.name) for user in users_of_large_weights(model)}
    assert all("time_emb" in user for user in stored) and bool(stored) == (name == "denoiser")


def test_native_convolution_takes_half_weights_without_a_cast() -> None:
    text = (
        HEADER.replace('"other"', '"latentforge"')
        + """
    m (float[2,8,8,8] x, float[1,8,3,3,16] w) => (float[2,8,8,16] y)
    { y = latentforge.Conv<channels = 16, pads = [1,1,1,1], silu = 0, stride = 1, upsample = 1>
      (x, w) }"""
    )
    model = ir.from_onnx_text(text)
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(RNG.standard_normal((1, 8, 3, 3, 16)).astype(np.float32))
    model.graph.register_initializer(weight)
    assert store_half(model) == 1
    (conv,) = model.graph
    assert conv.inputs[1].dtype == ir.DataType.FLOAT16 and conv.inputs[1].is_initializer()
