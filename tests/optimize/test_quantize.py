"""Quantized graphs: exact scales, bounded errors, unchanged floats, and real 8-bit kernels."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from latentforge.optimize.graph import constant, extract_initializers, layers, open_session
from latentforge.optimize.quantize.calibration import collect_channel_maxima, collect_ranges
from latentforge.optimize.quantize.concat import concat_channels
from latentforge.optimize.quantize.nodes import is_quantized
from latentforge.optimize.quantize.options import (
    Int8Settings,
    SensitivitySettings,
    WeightOnlySettings,
)
from latentforge.optimize.quantize.qdq import plan_layers, quantize
from latentforge.optimize.quantize.ranges import choose_grid
from latentforge.optimize.quantize.sensitivity import (
    LayerSensitivity,
    measure_sensitivity,
    module_times,
    profiler_scopes,
    select_sensitive,
)
from latentforge.optimize.quantize.weights import quantize_weights
from latentforge.optimize.quantize.write import round_weight
from latentforge.optimize.recipe import Recipe
from latentforge.optimize.stage.component import Rewriter
from latentforge.optimize.targets import TARGETS
from latentforge.runtime.backends import Session
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import TensorSpec

Array = NDArray[np.float32]
Feeds = dict[str, Array]

HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
SMALL = f"""{HEAD}
small (float[b,4,h,w] sample, float[b,3,6] context) => (float[b,t,6] y) {{
  [block.conv/Conv] c = Conv<pads = [1, 1, 1, 1]>(sample, conv_w, conv_b)
  [block.act/Sigmoid] s = Sigmoid(c)
  [block.act/Mul] a = Mul(c, s)
  [block.proj/Transpose] p = Transpose<perm = [0, 2, 3, 1]>(a)
  [block.proj/Reshape] r = Reshape(p, shape)
  [block.norm/LayerNormalization] n = LayerNormalization<axis = -1>(r, gamma, beta)
  [block.to_q/MatMul] q = MatMul(n, q_w)
  [block.to_k/MatMul] k = MatMul(n, k_w)
  [block.to_v/MatMul] v = MatMul(context, v_w)
  [block.mean/ReduceMean] m = ReduceMean<keepdims = 1>(v, one)
  [block/Add] qk = Add(q, k)
  [block/Add_2] u = Add(qk, m)
  [block.to_out/MatMul] o = MatMul(u, o_w)
  [block.to_out/Add] y = Add(o, o_b)
}}"""
SHAPES = {
    "conv_w": (8, 4, 3, 3),
    "conv_b": (8,),
    "gamma": (8,),
    "beta": (8,),
    "q_w": (8, 6),
    "k_w": (8, 6),
    "v_w": (6, 6),
    "o_w": (6, 6),
    "o_b": (6,),
}
SKIP = f"""{HEAD}
skip (float[b,4,h,w] sample) => (float[b,2,h,w] y) {{
  [up.scale/Mul] loud = Mul(sample, hundred)
  [up/Concat] joined = Concat<axis = 1>(sample, loud)
  [up.act/Sigmoid] s = Sigmoid(joined)
  [up.act/Mul] a = Mul(joined, s)
  [up.conv/Conv] y = Conv(a, w, b)
}}"""


def make(text: str, constants: Mapping[str, NDArray[Any]]) -> ir.Model:
    """Parse ONNX text in which nodes may have names such as a.b/MatMul, and add initializers."""
    names = re.findall(r"\[([\w.]+/\w+)\]", text)
    for index, name in enumerate(names):
        text = text.replace(f"[{name}]", f"[name_{index}]", 1)
    model = ir.from_onnx_text(text)
    for node in model.graph:
        if str(node.name).startswith("name_"):
            node.name = names[int(str(node.name)[5:])]
    for name, array in constants.items():
        found = [v for n in model.graph for v in n.inputs if v is not None and v.name == name]
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        model.graph.register_initializer(value)
        found[0].replace_all_uses_with(value)
    ShapeInferencePass()(model)
    return model


def small() -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in SHAPES.items()}
    shapes = {"shape": np.array([0, -1, 8]), "one": np.array([1])}
    return make(SMALL, {**arrays, **shapes})


def skip() -> ir.Model:
    w = np.random.default_rng(1).normal(size=(2, 8, 1, 1)).astype(np.float32)
    b = np.array([1, -1], np.float32)
    return make(SKIP, {"hundred": np.float32(100), "w": w, "b": b})


def small_feeds(count: int = 3) -> list[Feeds]:
    rng = np.random.default_rng(2)
    shapes = {"sample": (2, 4, 4, 5), "context": (2, 3, 6)}
    return [
        {name: rng.normal(size=size).astype(np.float32) for name, size in shapes.items()}
        for _ in range(count)
    ]


def skip_feeds() -> list[Feeds]:
    return [{"sample": feed["sample"]} for feed in small_feeds()]


def load(model: ir.Model, **options: Any) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings)


def run(model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> Array:
    return np.asarray(load(model).run(None, dict(feeds))[0])


def error(model: ir.Model, reference: ir.Model, feeds: list[Feeds]) -> float:
    """Return the mean squared error of the outputs, relative to the reference's mean square."""
    pairs = [(run(model, feed), run(reference, feed)) for feed in feeds]
    return float(
        np.mean([np.mean((a - b) ** 2) for a, b in pairs])
        / np.mean([np.mean(b**2) for _, b in pairs])
    )


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def is_integer(value: ir.Value | None) -> bool:
    """Return True if a value is a dequantized integer."""
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def optimized(model: ir.Model, path: Path) -> list[str]:
    """Return the operators of the graph after ONNX Runtime's optimizations."""
    load(model, optimized_model_filepath=str(path), log_severity_level=3)
    return operators(ir.load(path))


def test_known_scales() -> None:
    """Peak 127 and weights up to 63 and 126, in 7 bits: scales of 1, 1 and 2."""
    text = f"{HEAD}\nm (float[b,2] sample) => (float[b,2] y) {{ [l/MatMul] y = MatMul(sample, w) }}"
    w = np.array([[63, -126], [21, 41.6]], np.float32)
    model = make(text, {"w": w})
    sample = np.array([[127, -3], [5, 1]], np.float32)
    counts = quantize(model, [{"sample": sample}], Int8Settings(ranges="minmax", symmetric=True))
    assert counts == Counter(linears=1)
    node = model.graph[-1]
    assert (node.op_type, node.name) == ("MatMulIntegerToFloat", "l/MatMul")
    found = [constant(value) for value in node.inputs[1:5]]
    np.testing.assert_array_equal(found[0], [[63, -63], [21, 21]])
    assert found[1] == 1.0
    np.testing.assert_array_equal(found[2], [1, 2])
    assert found[3] == 128
    rounded = np.array([[63, -126], [21, 42]])
    np.testing.assert_allclose(run(model, {"sample": sample}), sample @ rounded, rtol=1e-6)


def test_an_asymmetric_grid_covers_the_range() -> None:
    """The grid goes from -1 to 3 in 255 steps, and contains zero."""
    model = small()
    value = model.graph.inputs[0]
    feed = {**small_feeds(1)[0], "sample": np.linspace(-1, 3, 160, dtype=np.float32)}
    feed["sample"] = feed["sample"].reshape(2, 4, 4, 5)
    observed = collect_ranges(model, [value], [feed], histogram=False)[value]
    assert (observed.min, observed.max) == (-1, 3)
    found = choose_grid(observed, Int8Settings(ranges="minmax", symmetric=False), signed=False)
    assert found.scale == pytest.approx(4 / 255) and found.zero_point == 64 and found.qmin == 0
    assert choose_grid(
        observed, Int8Settings(ranges="minmax", symmetric=False), signed=True
    ).scale == pytest.approx(3 / 127)


@pytest.mark.parametrize("form", ["qdq", "onnxruntime"])
def test_error_is_that_of_8_bits(form: Any) -> None:
    model, feeds = small(), small_feeds()
    smoothed = 2  # no norm precedes to_out
    counts = quantize(model, feeds, Int8Settings(ranges="minmax", exclude=()), form)
    assert counts == Counter(convs=1, linears=3, smoothed=smoothed, weights=1)
    assert 1e-7 < error(model, small(), feeds) < 1e-3


def test_forms() -> None:
    plain, fast = small(), small()
    quantize(plain, small_feeds(), Int8Settings(exclude=()), "qdq")
    quantize(fast, small_feeds(), Int8Settings(exclude=()), "onnxruntime")
    zeros = [constant(n.inputs[2]) for n in plain.graph if n.op_type == "QuantizeLinear"]
    assert len(zeros) == 3 and all(z is not None and z.dtype == np.int8 and z == 0 for z in zeros)
    biases = [n.inputs[2] for n in plain.graph if n.op_type == "Conv"]
    assert biases[0] is not None and biases[0].dtype == ir.DataType.FLOAT
    assert "MatMulIntegerToFloat" not in operators(plain)
    assert operators(fast).count("MatMulIntegerToFloat") == 3
    assert operators(fast).count("Add") == 2  # the bias of to_out went into its product
    (conv,) = [node for node in fast.graph if node.op_type == "Conv"]
    assert all(is_integer(value) for value in conv.inputs)
    bias = conv.inputs[2].producer().inputs[0]  # type: ignore[union-attr]
    assert bias is not None and bias.dtype == ir.DataType.INT32


def test_kernels_compute_in_8_bits(tmp_path: Path) -> None:
    model = small()
    quantize(model, small_feeds(), Int8Settings(exclude=()))
    found = optimized(model, tmp_path / "optimized.onnx")
    assert found.count("QLinearConv") == 1
    assert found.count("MatMulIntegerToFloat") == 3
    assert "Conv" not in found and "FusedConv" not in found
    assert (
        found.count("MatMul") + found.count("MatMulNBits") == 1
    )  # to_v depends on the prompt alone


def test_excluded_and_sample_independent_layers_keep_float_activations() -> None:
    model = small()
    before = {layer.name: layer.weight for layer in layers(model.graph)}
    counts = quantize(model, small_feeds(), Int8Settings(exclude=("*.to_out/*", "block.conv/Conv")))
    assert (counts["convs"], counts["linears"], counts["kept"]) == (0, 2, 2)
    left = {layer.name: layer.weight for layer in layers(model.graph)}
    assert left == {name: before[name] for name in ("block.conv/Conv", "block.to_out/MatMul")}
    (v,) = [node for node in model.graph if node.name == "block.to_v/MatMul"]
    assert v.inputs[0] is model.graph.inputs[1]  # the prompt alone: int8 weights only
    assert counts["weights"] == 1 and is_integer(v.inputs[1])


def test_weights_have_a_scale_per_channel() -> None:
    array = np.diag([1.0, 10.0, 100.0]).astype(np.float32)
    integers, scale = round_weight(array, 0, 127)
    np.testing.assert_array_equal(integers, 127 * np.eye(3))
    np.testing.assert_allclose(scale, [1 / 127, 10 / 127, 100 / 127], rtol=1e-6)
    assert round_weight(array, 0, 63)[0].max() == 63
    assert round_weight(np.zeros((2, 3), np.float32), 1, 127)[1].tolist() == [1, 1, 1]


def test_gemm() -> None:
    text = f"""{HEAD}
    m (float[b,5] sample) => (float[b,7] y) {{ [l/Gemm] y = Gemm<transB = 1>(sample, w, b) }}"""
    rng = np.random.default_rng(0)
    w, b = (rng.normal(size=size).astype(np.float32) for size in ((7, 5), (7,)))
    feeds = [{"sample": rng.normal(size=(9, 5)).astype(np.float32)}]
    for form in ("qdq", "onnxruntime"):
        model = make(text, {"w": w, "b": b})
        assert quantize(model, feeds, Int8Settings(), form)["linears"] == 1  # type: ignore[arg-type]
        assert error(model, make(text, {"w": w, "b": b}), feeds) < 1e-3


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0])
def test_smoothing_preserves_the_outputs(alpha: float) -> None:
    model, feeds = small(), small_feeds()
    settings = Int8Settings(smoothquant_alpha=alpha, smoothquant_insert_mul=True, exclude=())
    _, counts = plan_layers(model, feeds, settings, "onnxruntime")
    assert counts["smoothed"] == 3
    for feed in feeds:
        np.testing.assert_allclose(run(model, feed), run(small(), feed), atol=1e-5)
    assert operators(model).count("Mul") == operators(small()).count("Mul") + 1  # before to_out


def test_smoothing_folds_into_the_norm_and_equalizes_channels() -> None:
    """With alpha 1, the largest magnitude of each input channel is 1."""
    model, feeds = small(), small_feeds()
    plan_layers(
        model,
        feeds,
        Int8Settings(smoothquant_alpha=1.0, exclude=("*to_out*", "*conv*")),
        "onnxruntime",
    )
    assert operators(model) == operators(small())
    (norm,) = [node for node in model.graph if node.op_type == "LayerNormalization"]
    value = norm.outputs[0]
    maxima = collect_channel_maxima(model, {value: (-1, 8)}, feeds)[value]
    np.testing.assert_allclose(maxima, np.ones(8), rtol=1e-5)


@pytest.mark.parametrize("norm", ["SkipLayerNormalization", "Mul", "shared"])
def test_smoothing_before_other_norms(norm: str) -> None:
    before = {
        "SkipLayerNormalization": "n = com.microsoft.SkipLayerNormalization(sample, sample, g, e)",
        "Mul": "x = Mul(sample, g) n = Add(x, e)",
        "shared": "n = LayerNormalization(sample, g, e)",
    }[norm]
    more = "z = Relu(n)" if norm == "shared" else "z = Relu(sample)"
    text = f"""{HEAD}
    m (float[b,4,6] sample) => (float[b,4,3] y, float[b,4,6] z)
    {{ {before} [l/MatMul] y = MatMul(n, w) {more} }}"""
    rng = np.random.default_rng(0)
    sizes = {"g": 6, "e": 6, "w": (6, 3)}
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    feeds = [{"sample": rng.normal(size=(2, 4, 6)).astype(np.float32)}]
    model = make(text, arrays)
    plan_layers(
        model,
        feeds,
        Int8Settings(smoothquant_alpha=0.5, smoothquant_insert_mul=True),
        "onnxruntime",
    )
    for a, b in zip(
        load(model).run(None, feeds[0]), load(make(text, arrays)).run(None, feeds[0]), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    added = operators(model).count("Mul") - operators(make(text, arrays)).count("Mul")
    assert added == (1 if norm == "shared" else 0)


def test_concatenated_tensors_get_separate_ranges() -> None:
    model, feeds = skip(), skip_feeds()
    (layer,) = layers(model.graph)
    assert concat_channels(layer) == (4, 4)
    _, counts = plan_layers(
        model, feeds, Int8Settings(split_concat=2.0, smoothquant_alpha=0.0), "qdq"
    )
    assert counts["split"] == 1
    np.testing.assert_allclose(run(model, feeds[0]), run(skip(), feeds[0]), rtol=1e-4, atol=1e-4)
    assert [node.name for node in model.graph if node.op_type == "Conv"] == [
        "up.conv/Conv",
        "up.conv/Conv_4",
    ]
    assert plan_layers(skip(), feeds, Int8Settings(split_concat=1000.0), "qdq")[1]["split"] == 0
    assert plan_layers(skip(), feeds, Int8Settings(split_concat=0), "qdq")[1]["split"] == 0


def test_a_split_keeps_what_one_range_loses() -> None:
    """One range for parts that differ by a factor of 100 rounds the smaller part to nothing."""
    apart, together, feeds = skip(), skip(), skip_feeds()
    for model in (apart, together):
        weights = layers(model.graph)[0].weight
        array = np.array(constant(weights))
        array[:, 4:] /= 100  # both parts contribute equally
        weights.const_value = ir.tensor(array, name=weights.name)
    reference = apart.clone()
    quantize(apart, feeds, Int8Settings(ranges="minmax"), "qdq")
    quantize(together, feeds, Int8Settings(ranges="minmax", split_concat=0), "qdq")
    assert error(apart, reference, feeds) < 0.2 * error(together, reference, feeds)


def test_ranges_of_known_values() -> None:
    """Check the clipping range of each method for 1 to 999 evenly and one value of 10000."""
    text = f"{HEAD}\nm (float[n] sample) => (float[n] y) {{ y = Relu(sample) }}"
    model = ir.from_onnx_text(text)
    value = model.graph.inputs[0]
    sample = np.append(np.arange(1, 1000), 10_000).astype(np.float32)
    feeds = [{"sample": sample[:300]}, {"sample": sample[300:]}]
    observed = collect_ranges(model, [value], feeds, histogram=True)[value]
    assert (observed.min, observed.max, observed.histogram.sum()) == (0, 10_000, 1000)
    top = {
        method: 127
        * choose_grid(observed, Int8Settings(ranges=method, percentile=90.0), signed=True).scale
        for method in ("minmax", "percentile", "mse")
    }
    assert top["minmax"] == pytest.approx(10_000)
    assert top["percentile"] == pytest.approx(900, rel=0.012)
    steps = [clip / 127 for clip in 10_000 * 2.0 ** (-np.arange(33) / 8)]
    errors = [np.mean((np.clip(np.rint(sample / s), -127, 127) * s - sample) ** 2) for s in steps]
    assert top["mse"] == pytest.approx(127 * steps[int(np.argmin(errors))])


def test_a_tensor_of_zeros_has_a_grid() -> None:
    model = small()
    value = model.graph.inputs[0]
    feed = {**small_feeds(1)[0], "sample": np.zeros((1, 4, 2, 2), np.float32)}
    feed["context"] = feed["context"][:1]
    observed = collect_ranges(model, [value], [feed], histogram=True)[value]
    for method in ("minmax", "percentile", "mse"):
        assert choose_grid(observed, Int8Settings(ranges=method), signed=False).scale == 1.0  # type: ignore[arg-type]


def test_refusals() -> None:
    model = small()
    with pytest.raises(SettingsError, match="no calibration inputs"):
        quantize(model, [], Int8Settings())
    assert not is_quantized(model)
    quantize(model, small_feeds(1), Int8Settings(exclude=()))
    assert is_quantized(model)
    for again in (
        lambda: quantize(model, small_feeds(1), Int8Settings()),
        lambda: quantize_weights(model, WeightOnlySettings()),
    ):
        with pytest.raises(SettingsError, match="start from the float engines"):
            again()


@pytest.mark.parametrize(
    "make_settings",
    [
        lambda: Int8Settings(percentile=101.0),
        lambda: Int8Settings(smoothquant_alpha=1.5),
        lambda: Int8Settings(smoothquant_alpha=float("nan")),
        lambda: Int8Settings(split_concat=0.5),
        lambda: WeightOnlySettings(block_size=24),
        lambda: SensitivitySettings(float_fraction=2.0),
    ],
)
def test_settings_out_of_range(make_settings: Callable[[], Any]) -> None:
    with pytest.raises(SettingsError, match="not|block"):
        make_settings()


def test_same_input_same_bytes() -> None:
    def content(settings: Int8Settings) -> bytes:
        model = small()
        quantize(model, small_feeds(), settings)
        return bytes(ir.to_proto(model).SerializeToString(deterministic=True))

    for settings in (
        Int8Settings(smoothquant_insert_mul=True, exclude=()),
        Int8Settings(ranges="minmax"),
    ):
        assert content(settings) == content(settings)


TABLE = f"""{HEAD}
table (int64[b,n] ids) => (float[b,n,32] y) {{
  [embed/Gather] e = Gather(table, ids)
  [fc/MatMul] h = MatMul(e, fc_w)
  [fc/Add] y = Add(h, fc_b)
}}"""


def table(width: int = 100) -> ir.Model:
    rng = np.random.default_rng(0)
    sizes = {"table": (500, width), "fc_w": (width, 32), "fc_b": (32,)}
    return make(TABLE, {k: rng.normal(size=size).astype(np.float32) for k, size in sizes.items()})


@pytest.mark.parametrize(
    ("bits", "block", "width", "form", "share", "bound"),
    [
        (8, 0, 96, "qdq", 0.28, 2e-4),  # ONNX Runtime makes it a MatMulNBits, which rounds more
        (8, 0, 100, "onnxruntime", 0.28, 1e-4),
        (8, 32, 96, "qdq", 0.29, 2e-4),
        (8, 32, 100, "onnxruntime", 0.29, 1e-4),
        (4, 32, 96, "qdq", 0.28, 1e-2),
        (4, 32, 100, "onnxruntime", 0.28, 1e-2),
    ],
)
def test_weight_only_quantization(
    bits: Any, block: int, width: int, form: Any, share: float, bound: float
) -> None:
    model = table(width)
    assert quantize_weights(model, WeightOnlySettings(block_size=block), form, bits=bits) == 2
    sizes = [len(ir.to_proto(m).SerializeToString()) for m in (model, table(width))]
    assert sizes[0] < share * sizes[1]
    feeds: Any = [{"ids": np.arange(500).reshape(2, 250)}]
    assert error(model, table(width), feeds) < bound
    assert ("MatMulNBits" in operators(model)) == (block > 0 and form == "onnxruntime")
    assert model.graph.opset_imports[""] == (21 if block and form == "qdq" else 20)


def test_sizes_that_blocks_do_not_divide_have_none_in_qdq() -> None:
    """OpenVINO refuses short blocks."""
    model = table(100)
    assert quantize_weights(model, WeightOnlySettings(), "qdq", bits=4) == 2
    nodes = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(nodes) == 2 and not any("block_size" in node.attributes for node in nodes)
    stored = [node.inputs[0] for node in nodes]
    assert {value.dtype for value in stored if value is not None} == {ir.DataType.INT8}


def test_a_table_in_qdq_is_dequantized_by_row_before_its_gather() -> None:
    """TensorRT accepts integer weights only there, and OpenVINO no scales of columns there."""
    model = table()
    quantize_weights(model, WeightOnlySettings(), "qdq")
    (gather,) = [node for node in model.graph if node.op_type == "Gather"]
    source = gather.inputs[0].producer() if gather.inputs[0] is not None else None
    assert source is not None and source.op_type == "DequantizeLinear"
    assert source.attributes.get_int("axis", 1) == 0


@pytest.mark.parametrize(
    ("precision", "block", "expected"),
    [("int4-weights", 0, (4, 32)), ("int4-weights", 64, (4, 64)), ("int8-weights", 64, (8, 64))],
)
def test_the_precision_determines_the_bits(precision: Any, block: int, expected: Any) -> None:
    model, weights = table(), WeightOnlySettings(block_size=block)
    recipe = Recipe(summary="", precision={"text_encoder": precision}, weight_only=weights)
    component = Component(
        file="t.onnx",
        sha256="0" * 64,
        bytes=0,
        backend="onnxruntime",
        precision="fp32",
        inputs={"ids": TensorSpec(dtype="int64", shape=("b", "n"))},
        outputs={"y": TensorSpec(dtype="float32", shape=("b", "n", 32))},
    )
    rewriter = Rewriter(recipe=recipe, target=TARGETS["cpu"], feeds={})
    rewritten = rewriter.rewrite("text_encoder", model, component)
    assert rewritten.counts[precision] == 2
    (linear,) = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert tuple(linear.attributes.get_int(name) for name in ("bits", "block_size")) == expected


def test_int4_graphs_run_from_memory() -> None:
    model, feeds = table(96), {"ids": np.arange(6).reshape(2, 3)}
    quantize_weights(model, WeightOnlySettings(), "qdq", bits=4)
    dtypes = {value.dtype for value in model.graph.initializers.values()}
    assert ir.DataType.INT4 in dtypes
    np.testing.assert_array_equal(open_session(model).run(None, feeds)[0], run(model, feeds))


def test_scalars_have_no_axes() -> None:
    """A scale with an axis would count as one per channel."""
    model = small()
    quantize(model, small_feeds(1), Int8Settings(), "qdq")
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    values = [value for node in nodes for value in node.inputs[1:]]
    assert values and {np.shape(constant(value)) for value in values} == {()}


def test_weight_only_quantization_of_convs_with_excluded_layers() -> None:
    model = small()
    assert quantize_weights(model, WeightOnlySettings(exclude=("*to_*",))) == 1
    assert [layer.name for layer in layers(model.graph)] == [
        f"block.to_{name}/MatMul" for name in ("q", "k", "v", "out")
    ]
    assert error(model, small(), small_feeds()) < 1e-3


def fragile() -> ir.Model:
    """Build the small graph with one input channel of to_q so large that the others round to 0."""
    model = small()
    weights = {layer.name: layer.weight for layer in layers(model.graph)}
    weight = weights["block.to_q/MatMul"]
    array = np.array(constant(weight))
    array[0] = 0
    weight.const_value = ir.tensor(array, name=weight.name)
    gamma = model.graph.initializers["gamma"]
    scale = np.array(constant(gamma))
    scale[0] = 1000
    gamma.const_value = ir.tensor(scale, name="gamma")
    weights["block.to_k/MatMul"].const_value = ir.tensor(np.zeros((8, 6), np.float32), name="k_w")
    return model


def test_sensitivity_is_highest_for_the_fragile_layer() -> None:
    model, feeds = fragile(), small_feeds()

    def denoise(session: Session) -> Array:
        outputs = [session.run(feed)["y"] for feed in feeds]
        return np.concatenate(outputs).astype(np.float32)

    records = measure_sensitivity(model, feeds, Int8Settings(exclude=(), ranges="minmax"), denoise)
    assert not is_quantized(model)
    assert records[0].name == "block.to_q/MatMul" and records[0].error > 10 * records[1].error
    assert [r.error for r in records] == sorted((r.error for r in records), reverse=True)
    saved = {record.name: record.bytes for record in records}
    assert saved["block.to_q/MatMul"] == 3 * 48 - 4 * 6
    assert saved["block.conv/Conv"] == 3 * 288 - 4 * 8
    assert select_sensitive(records, SensitivitySettings(float_fraction=0.25)) == (
        "block.to_q/MatMul",
    )
    alone = fragile()
    quantize(
        alone, feeds, Int8Settings(ranges="minmax", exclude=tuple(r.name for r in records[1:]))
    )
    assert records[0].error == pytest.approx(error(alone, fragile(), feeds), rel=0.05)


def test_profiled_times_are_attributed_to_modules(tmp_path: Path) -> None:
    """ONNX Runtime names a float Conv after its output, and a fused node after its first part."""
    model, record = small(), tmp_path / "record"
    session = open_session(model, profile=str(record))
    for feed in small_feeds():
        session.run(None, dict(feed))
    names = [layer.name for layer in layers(model.graph)]
    found = module_times(session.end_profiling(), profiler_scopes(model, names))
    assert set(found) >= {name.rpartition("/")[0] for name in names}


def test_select_sensitive() -> None:
    def record(name: str, error: float, size: int, seconds: float) -> LayerSensitivity:
        return LayerSensitivity(name=name, error=error, bytes=size, seconds=seconds)

    records = [record("a", 4, 400, 1), record("b", 3, 100, -1), record("c", 2, 1000, 0.1)]
    assert select_sensitive(records, SensitivitySettings(float_fraction=0.34)) == ("b",)
    assert select_sensitive(records, SensitivitySettings(float_fraction=0.67)) == ("b", "a")
    assert select_sensitive(
        records, SensitivitySettings(float_fraction=0.0, benefit="latency")
    ) == ("b",)
    assert select_sensitive(
        records, SensitivitySettings(float_fraction=0.67, benefit="latency")
    ) == ("b", "c")


def test_weights_in_other_files_are_lent_and_not_copied(tmp_path: Path) -> None:
    """A model of gigabytes would not fit into the two that a message may have."""
    model = small()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data")
    loaded = ir.load(tmp_path / "m.onnx")
    outside = {
        name
        for name, value in loaded.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes >= 1024
    }
    assert outside and outside <= extract_initializers(loaded.clone().graph).keys()
    feed = small_feeds(1)[0]
    (got,) = open_session(loaded).run(None, dict(feed))
    (expected,) = open_session(model).run(None, dict(feed))
    np.testing.assert_array_equal(got, expected)
