"""Each pass rewrites its pattern, keeps the results, then finds nothing; it declines the rest."""

import io
import logging
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import native_operators
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from cuda_operators import OPERATORS
from onnx.reference import ReferenceEvaluator

from latentforge.optimize.passes import PASSES
from latentforge.optimize.passes.matching import collect_declined
from latentforge.optimize.passes.runner import optimize

Array = np.ndarray[Any, Any]

TOLERANCE = 2e-5


def parsed(text: str, **weights: Array) -> ir.Model:
    """Parse ONNX text, make initializers of the inputs with weights, and name nodes in a module."""
    return parsed_at(20, text, **weights)


def parsed_at(opset: int, text: str, **weights: Array) -> ir.Model:
    """Parse ONNX text of an opset."""
    model = ir.from_onnx_text(
        f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}'
    )
    for node in model.graph:
        node.name = f"block/{node.outputs[0].name}"
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[str(value.name)], name=value.name)
            model.graph.register_initializer(value)
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
    return ir.from_proto(inferred)


def computed(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    """Return the outputs by ONNX Runtime, or by numpy where it has no CPU kernel."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    if any(node.domain == "latentforge" for node in model.graph):
        operators = [*OPERATORS, *native_operators.OPERATORS]
        return list(ReferenceEvaluator(proto, new_ops=operators).run(None, dict(feeds)))
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(proto.SerializeToString(), options)
        return list(session.run(None, dict(feeds)))
    except Exception as error:
        if not re.search("NOT_IMPLEMENTED|not implemented for CPU", str(error)):
            raise
        return list(ReferenceEvaluator(proto, new_ops=OPERATORS).run(None, dict(feeds)))


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def rewritten(
    name: str, model: ir.Model, feeds: Mapping[str, Array], expected: int, atol: float = TOLERANCE
) -> Counter[str]:
    """Apply a pass, check what holds for every pass, and count the operators that remain."""
    before = computed(model, feeds)
    signature = [
        (v.name, str(v.shape), v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)
    ]
    assert PASSES[name](model) == expected
    for reference, output in zip(before, computed(model, feeds), strict=True):
        assert np.abs(reference).max() > 0.01
        np.testing.assert_allclose(output, reference, atol=atol)
    assert signature == [
        (v.name, str(v.shape), v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)
    ]
    names = [node.name for node in model.graph]
    assert all(names) and len(set(names)) == len(names)
    assert PASSES[name](model) == 0
    return kinds(model)


def untouched(name: str, model: ir.Model, reason: str = "") -> None:
    """Check that a pass leaves a graph alone, and that a reason begins so, if given."""
    before = [(node.name, node.op_type) for node in model.graph]
    with collect_declined() as declined:
        assert PASSES[name](model) == 0
    assert [(node.name, node.op_type) for node in model.graph] == before
    assert not reason or any(text.startswith(reason) for text in declined), list(declined)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# -- fold-constants --------------------------------------------------------------------------------

IDLE = """m (float[batch, 4] x) => (float[batch, 4] y)
<float two = {2.0}, float three = {3.0}>
{
  six = Mul(two, three)
  a = Cast<to = 1>(x)
  b = Transpose<perm = [1, 0]>(a)
  c = Transpose<perm = [1, 0]>(b)
  d = Mul(c, six)
  e = Mul(x, six)
  unused = Exp(x)
  y = Add(d, e)
}"""


def test_fold_constants_removes_idle_nodes() -> None:
    model = parsed(IDLE)
    left = rewritten("fold-constants", model, {"x": random(3, 4)}, expected=6)
    assert left == {"Mul": 1, "Add": 1}
    assert [node.name for node in model.graph] == ["block/d", "block/y"]
    assert str(model.graph.inputs[0].shape) == "[batch,4]"


def test_fold_constants_makes_no_large_constant() -> None:
    model = parsed("""m (float[1] x) => (float[2048, 2048] y)
    <int64[2] shape = {2048, 2048}, float[1] one = {1.0}>
    { ones = Expand(one, shape)  zeros = ConstantOfShape(shape)
      a = Add(ones, zeros)  y = Mul(a, x) }""")
    PASSES["fold-constants"](model)
    assert max(value.const_value.size for value in model.graph.initializers.values()) < 10


TARGET = """m (float[batch, tokens, 12] x) => (float[batch, tokens, 3, 4] y)
<int64[1] rest = {-1}, int64[1] heads = {3}, int64[1] channels = {4}>
{
  rows = Shape<start = 0, end = 1>(x)
  shape = Concat<axis = 0>(rows, rest, heads, channels)
  y = Reshape<allowzero = 1>(x, shape)
}"""


def test_fold_constants_makes_targets_of_reshape_constant() -> None:
    model = parsed(TARGET)
    left = rewritten("fold-constants", model, {"x": random(2, 5, 12)}, expected=3)
    assert left == {"Reshape": 1}
    target = next(iter(model.graph)).inputs[1]
    assert target is not None and target.const_value is not None
    assert target.const_value.numpy().tolist() == [0, -1, 3, 4]


def test_fold_constants_leaves_targets_that_depend_on_more_sizes() -> None:
    text = """m (float[batch, area, 4] x, float[batch, 4, height, width] like)
        => (float[batch, height, width, 4] y) <int64[1] four = {4}>
    { rows = Shape<start = 0, end = 1>(like)  plane = Shape<start = 2, end = 4>(like)
      shape = Concat<axis = 0>(rows, plane, four)  y = Reshape(x, shape) }"""
    model = parsed(text)
    untouched("fold-constants", model, "several sizes of its target")
    assert kinds(model)["Shape"] == 2


DETOUR = """m (float[batch, 3, tokens, 4] x) => (float[batch, 3, 4, tokens] y)
<int64[1] rest = {-1}, int64[3] joined = {-1, 5, 4}>
{
  shape = Shape(x)
  tokens = Shape<start = 2, end = 3>(x)
  channels = Shape<start = 3>(x)
  front = Shape<start = 0, end = 2>(x)
  three = Concat<axis = 0>(rest, tokens, channels)
  flat = Reshape(x, three)
  turned = Transpose<perm = [0, 2, 1]>(flat)
  four = Concat<axis = 0>(front, channels, tokens)
  y = Reshape(turned, four)
}"""


def test_fold_constants_transposes_keys_directly() -> None:
    model = parsed(DETOUR)
    left = rewritten("fold-constants", model, {"x": random(2, 3, 5, 4)}, expected=9)
    assert left == {"Transpose": 1}


def test_fold_constants_leaves_other_detours() -> None:
    model = parsed(DETOUR.replace("Concat<axis = 0>(rest, tokens, channels)", "Identity(joined)"))
    with collect_declined() as declined:
        PASSES["fold-constants"](model)
    assert kinds(model)["Reshape"] == 2
    assert any("does not merge the first two axes" in reason for reason in declined)


def test_fold_constants_leaves_weights_on_disk(tmp_path: Path) -> None:
    model = parsed(
        "m (float[n, 64] x, float[64, 64] w) => (float[n, 64] y)\n"
        "<float one = {1.0}> { a = MatMul(x, w)  y = Mul(a, one) }",
        w=random(64, 64),
    )
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=1024)
    loaded = ir.load(tmp_path / "m.onnx")
    assert PASSES["fold-constants"](loaded) == 1
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)


# -- norms and activations -------------------------------------------------------------------------

NORM = """m (float[batch, 6, 8] x, float[8] scale, float[8] bias) => (float[batch, 6, 8] y)
<int64[1] last = {-1}, float two = {2.0}, float eps = {0.00001}>
{
  mean = ReduceMean<keepdims = 1>(x, last)
  off = Sub(x, mean)
  square = Pow(off, two)
  variance = ReduceMean<keepdims = 1>(square, last)
  shifted = Add(variance, eps)
  deviation = Sqrt(shifted)
  normed = Div(off, deviation)
  scaled = Mul(normed, scale)
  y = Add(scaled, bias)
}"""


SQUARED = ("square = Pow(off, two)", "square = Mul(off, off)")
RECIPROCAL = (
    "normed = Div(off, deviation)",
    "inverse = Reciprocal(deviation)  normed = Mul(off, inverse)",
)
UNBIASED = ("scaled = Mul(normed, scale)\n  y = Add(scaled, bias)", "y = Mul(scale, normed)")


def norm(*changes: tuple[str, str], opset: int = 20) -> ir.Model:
    text = NORM
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    weights = {"scale": random(8), "bias": random(8, seed=1)}
    return parsed_at(opset, text, **{k: v for k, v in weights.items() if f" {k}" in text})


@pytest.mark.parametrize(
    "changes", [[], [SQUARED], [RECIPROCAL], [SQUARED, RECIPROCAL], [UNBIASED]]
)
def test_fuse_layer_norm(changes: list[tuple[str, str]]) -> None:
    model = norm(*changes)
    left = rewritten("fuse-layer-norm", model, {"x": random(2, 6, 8)}, 1)
    assert left == {"LayerNormalization": 1}
    (node,) = model.graph
    assert node.name == "block/LayerNormalization" and len(node.inputs) == 3 - (UNBIASED in changes)
    assert node.attributes.get_float("epsilon", 0) == pytest.approx(1e-5)


def test_fuse_layer_norm_of_axes_in_an_attribute() -> None:
    """Opset 17 has LayerNormalization, and ReduceMean with the attribute that 18 replaced."""
    model = norm(
        ("ReduceMean<keepdims = 1>(x, last)", "ReduceMean<axes = [2], keepdims = 1>(x)"),
        ("ReduceMean<keepdims = 1>(square, last)", "ReduceMean<axes = [-1]>(square)"),
        opset=17,
    )
    assert rewritten("fuse-layer-norm", model, {"x": random(2, 6, 8)}, 1) == {
        "LayerNormalization": 1
    }


def test_fuse_layer_norm_of_a_converted_export() -> None:
    """torch's exporter at opset 16, converted to 18 by ONNX's own converter."""
    torch = pytest.importorskip("torch")
    layer = torch.nn.LayerNorm(8, eps=1e-3)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated: that is why it is here
        torch.onnx.export(layer, (torch.zeros(2, 6, 8),), file, opset_version=16, dynamo=False)
    exported = onnx.version_converter.convert_version(onnx.load_from_string(file.getvalue()), 18)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(exported))
    PASSES["fold-constants"](model)
    assert kinds(model)["ReduceMean"] == 2
    feeds = {str(model.graph.inputs[0].name): random(2, 6, 8)}
    assert rewritten("fuse-layer-norm", model, feeds, 1) == {"LayerNormalization": 1}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("{-1}", "{1}", ""),
        ("square = Pow(off, two)", "square = Mul(off, two)", ""),
        ("float two = {2.0}", "float two = {3.0}", ""),
        ("normed = Div(off, deviation)", "normed = Div(deviation, off)", "the standard deviation"),
        ("normed = Div(off, deviation)", "normed = Mul(off, deviation)", "the standard deviation"),
        ("scaled = Mul(normed, scale)", "scaled = Mul(normed, x)", "epsilon is no constant"),
        ("Add(variance, eps)", "Add(variance, variance)", "epsilon is no constant"),
    ],
)
def test_fuse_layer_norm_leaves_other_expressions(old: str, new: str, reason: str) -> None:
    untouched("fuse-layer-norm", norm((old, new)), reason)


GELU = """m (float[n] x) => (float[n] y)
<float r = {1.4142135381698608}, float one = {1.0}, float half = {0.5}>
{ a = Div(x, r)  b = Erf(a)  c = Add(b, one)  d = Mul(x, c)  y = Mul(d, half) }"""
HALVED = GELU.replace("d = Mul(x, c)  y = Mul(d, half)", "d = Mul(x, half)  y = Mul(d, c)")


@pytest.mark.parametrize("text", [GELU, HALVED])
def test_fuse_gelu(text: str) -> None:
    model = parsed(text)
    feeds = {"x": np.linspace(-4, 4, 33, dtype=np.float32)}
    assert rewritten("fuse-gelu", model, feeds, 1, atol=1e-6) == {"Gelu": 1}
    assert next(iter(model.graph)).name == "block/Gelu"


def test_fuse_gelu_leaves_other_numbers() -> None:
    untouched("fuse-gelu", parsed(GELU.replace("0.5", "0.25")), "the nodes around the Erf")


def test_fuse_gelu_needs_opset_20() -> None:
    untouched("fuse-gelu", parsed_at(19, GELU), "opset 19 has no Gelu")


CLIP = """m (float[n] x) => (float[n] y) <float alpha = {1.702}>
{ a = Mul(alpha, x)  b = Sigmoid(a)  y = Mul(x, b) }"""
SILU = "m (float[n] x) => (float[n] y) { a = Sigmoid(x)  y = Mul(a, x) }"


@pytest.mark.parametrize(("text", "alpha"), [(CLIP, 1.702), (SILU, 1.0)])
def test_fuse_quick_gelu(text: str, alpha: float) -> None:
    model = parsed(text)
    feeds = {"x": np.linspace(-4, 4, 33, dtype=np.float32)}
    assert rewritten("fuse-quick-gelu", model, feeds, 1, atol=1e-6) == {"QuickGelu": 1}
    assert next(iter(model.graph)).attributes.get_float("alpha", 0) == pytest.approx(alpha)


def test_fuse_quick_gelu_leaves_other_gates() -> None:
    shared = SILU.replace("(float[n] y)", "(float[n] y, float[n] a)")
    untouched("fuse-quick-gelu", parsed(shared), "the Sigmoid has several consumers")
    foreign = SILU.replace("(float[n] x)", "(float[n] x, float[n] z)").replace(
        "Mul(a, x)", "Mul(a, z)"
    )
    untouched("fuse-quick-gelu", parsed(foreign), "the Sigmoid is not of the other factor")


# -- attention -------------------------------------------------------------------------------------

SELF = """m (float[batch, tokens, 12] q, float[batch, {seen}, 12] k, float[batch, {seen}, 12] v)
    => (float[batch, tokens, 12] y)
<int64[4] cut = {0, -1, 3, 4}, int64[3] joined = {0, -1, 12}, float root = {0.5}>
{
  q4 = Reshape(q, cut)  qh = Transpose<perm = [0, 2, 1, 3]>(q4)  qs = Mul(qh, root)
  k4 = Reshape(k, cut)  kh = Transpose<perm = [0, 2, 1, 3]>(k4)
  kt = Transpose<perm = [0, 1, 3, 2]>(kh)  ks = Mul(root, kt)
  v4 = Reshape(v, cut)  vh = Transpose<perm = [0, 2, 1, 3]>(v4)
  scores = MatMul(qs, ks)
  weights = Softmax<axis = -1>(scores)
  heads = MatMul(weights, vh)
  rows = Transpose<perm = [0, 2, 1, 3]>(heads)
  y = Reshape(rows, joined)
}"""
KEYS = """kh = Transpose<perm = [0, 2, 1, 3]>(k4)
  kt = Transpose<perm = [0, 1, 3, 2]>(kh)"""
ATTENTION = {
    "self": SELF.replace("{seen}", "tokens"),
    "cross": SELF.replace("{seen}", "seen"),
    "keys transposed directly": SELF.replace("{seen}", "seen").replace(
        KEYS, "kt = Transpose<perm = [0, 2, 3, 1]>(k4)"
    ),
    "scaled scores": SELF.replace("{seen}", "seen")
    .replace("qs = Mul(qh, root)", "qs = Identity(qh)")
    .replace("ks = Mul(root, kt)", "ks = Identity(kt)")
    .replace("scores = MatMul(qs, ks)", "raw = MatMul(qh, kt)  scores = Div(raw, root)"),
    "keys by three axes": SELF.replace("{seen}", "seen").replace(
        "kt = Transpose<perm = [0, 1, 3, 2]>(kh)",
        """front = Shape<start = 0, end = 2>(kh)  seen = Shape<start = 2, end = 3>(kh)
  four = Shape<start = 3>(kh)  rest = Constant<value_ints = [-1]>()
  three = Concat<axis = 0>(rest, seen, four)  back = Concat<axis = 0>(front, four, seen)
  flat = Reshape(kh, three)  turned = Transpose<perm = [0, 2, 1]>(flat)
  kt = Reshape(turned, back)""",
    ),
    "three axes": """m (float[batch, 6, 12] q, float[batch, 5, 12] k, float[batch, 5, 12] v)
    => (float[batch, 6, 12] y)
<int64[4] cut = {0, -1, 3, 4}, int64[3] joined = {0, -1, 12}, float root = {0.5},
 int64[3] merged_q = {-1, 6, 4}, int64[3] merged_k = {-1, 5, 4}, int64[4] parted = {-1, 3, 6, 4}>
{
  q4 = Reshape(q, cut)  qh = Transpose<perm = [0, 2, 1, 3]>(q4)  q3 = Reshape(qh, merged_q)
  k4 = Reshape(k, cut)  kh = Transpose<perm = [0, 2, 1, 3]>(k4)  k3 = Reshape(kh, merged_k)
  v4 = Reshape(v, cut)  vh = Transpose<perm = [0, 2, 1, 3]>(v4)  v3 = Reshape(vh, merged_k)
  kt = Transpose<perm = [0, 2, 1]>(k3)
  scores = MatMul(q3, kt)  scaled = Mul(scores, root)
  weights = Softmax<axis = -1>(scaled)
  heads3 = MatMul(weights, v3)
  heads = Reshape(heads3, parted)
  rows = Transpose<perm = [0, 2, 1, 3]>(heads)
  y = Reshape(rows, joined)
}""",
}


def qkv(tokens: int = 6, seen: int = 5, channels: int = 12) -> dict[str, Array]:
    return {
        "q": random(2, tokens, channels, seed=1),
        "k": random(2, seen, channels, seed=2),
        "v": random(2, seen, channels, seed=3),
    }


@pytest.mark.parametrize("form", ATTENTION)
def test_fuse_attention(form: str) -> None:
    model = parsed(ATTENTION[form])
    seen = 6 if form == "self" else 5
    PASSES["fold-constants"](model) if form == "scaled scores" else None
    left = rewritten("fuse-attention", model, qkv(seen=seen), expected=1)
    assert left == {"MultiHeadAttention": 1}
    node = next(iter(model.graph))
    assert node.name == "block/MultiHeadAttention"
    assert node.attributes.get_int("num_heads", 0) == 3


def test_fuse_attention_of_one_head() -> None:
    text = ATTENTION["self"].replace("{0, -1, 3, 4}", "{0, -1, 1, 12}")
    model = parsed(text)
    assert rewritten("fuse-attention", model, qkv(seen=6), 1) == {"MultiHeadAttention": 1}


MASKED = (
    ATTENTION["self"]
    .replace("tokens", "6")
    .replace("float[batch, 6, 12] v)", "float[batch, 6, 12] v, bool[1, 1, 6, 6] seen)")
    .replace(
        "scores = MatMul(qs, ks)",
        """rows0 = Shape<start = 0, end = 1>(q)  ones = Constant<value_ints = [1, 6, 6]>()
  wide = Concat<axis = 0>(rows0, ones)  may = Expand(seen, wide)
  zero = Constant<value_float = 0.0>()  far = Constant<value_float = -3.4028235e38>()
  mask = Where(may, zero, far)  raw = MatMul(qs, ks)  scores = Add(raw, mask)""",
    )
    .replace(
        "heads = MatMul(weights, vh)",
        "nan = IsNaN(weights)  kept = Where(nan, zero, weights)  heads = MatMul(kept, vh)",
    )
)
CAUSAL = np.tri(6, dtype=bool)[None, None]


def masked(seen: Array) -> ir.Model:
    model = parsed(MASKED, seen=seen)
    PASSES["fold-constants"](model)
    return model


def test_fuse_attention_recognizes_a_causal_mask() -> None:
    model = masked(CAUSAL)
    assert rewritten("fuse-attention", model, qkv(seen=6), 1) == {"MultiHeadAttention": 1}
    assert next(iter(model.graph)).attributes.get_int("unidirectional", 0) == 1


def test_fuse_attention_adds_any_other_mask() -> None:
    seen = CAUSAL.copy()
    seen[..., 5, 0] = False
    model = masked(seen)
    left = rewritten("fuse-attention", model, qkv(seen=6), 1)
    assert left["MultiHeadAttention"] == left["Where"] == 1
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert "unidirectional" not in node.attributes and node.inputs[5] is not None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Softmax<axis = -1>", "Softmax<axis = 2>", "the softmax is over axis 2"),
        (
            "vh = Transpose<perm = [0, 2, 1, 3]>(v4)",
            "vs = Mul(v4, root)  vh = Transpose<perm = [0, 2, 1, 3]>(vs)",
            "the value is scaled",
        ),
        # not the batch, in a graph that leaves it free
        ("{0, -1, 12}", "{-1, 6, 12}", "Reshape of axes ('b', 's', 'h', 'd') to (-1, 6, 12)"),
        ("MatMul(qs, ks)", "Add(qs, ks)", "the scores are no MatMul"),
        ("MatMul(weights, vh)", "MatMul(vh, weights)", "the weights have another consumer"),
        ("qs = Mul(qh, root)", "qs = Neg(qh)", "the query is no projection split into heads: Neg"),
        (
            "qs = Mul(qh, root)",
            "qs = Mul(qh, qh)",
            "the query is no projection split into heads: Mul is not by a number",
        ),
        (
            "kt = Transpose<perm = [0, 1, 3, 2]>(kh)",
            "kt = Identity(kh)",
            "the key is no projection split into heads: Identity",
        ),
        (
            "rows = Transpose<perm = [0, 2, 1, 3]>(heads)",
            "n = Neg(heads)  m = Add(heads, n)  rows = Transpose<perm = [0, 2, 1, 3]>(m)",
            "the heads have several",
        ),
        ("rows = Transpose<perm = [0, 2, 1, 3]>(heads)", "rows = Neg(heads)", "the heads are con"),
    ],
)
def test_fuse_attention_declines_other_products(old: str, new: str, reason: str) -> None:
    assert old in ATTENTION["self"]
    untouched("fuse-attention", parsed(ATTENTION["self"].replace(old, new)), reason)


def test_fuse_attention_declines_masks_of_another_shape() -> None:
    text = MASKED.replace("Add(raw, mask)", "Add(raw, seven)").replace(
        "bool[1, 1, 6, 6] seen)", "bool[1, 1, 6, 6] seen, float[6, 6] seven)"
    )
    model = parsed(text, seen=CAUSAL)
    PASSES["fold-constants"](model)
    untouched("fuse-attention", model, "the mask has not the axes")


# -- residuals -------------------------------------------------------------------------------------

SKIP = """m (float[batch, tokens, 8] x, float[batch, tokens, 8] h, float[8, 8] w, float[8] b,
    float[8] gamma, float[8] beta) => (float[batch, tokens, 8] y, float[batch, tokens, 8] z)
{
  p = MatMul(h, w)  l = Add(p, b)
  s = Add(l, x)
  y = LayerNormalization<axis = -1, epsilon = 0.001>(s, gamma, beta)
  z = Neg(s)
}"""
SKIP_WEIGHTS = {
    "w": random(8, 8),
    "b": random(8, seed=4),
    "gamma": random(8, seed=5),
    "beta": random(8),
}
SKIP_FEEDS = {"x": random(2, 3, 8, seed=6), "h": random(2, 3, 8, seed=7)}


def test_fuse_skip_layer_norm_returns_the_sum_too() -> None:
    model = parsed(SKIP, **SKIP_WEIGHTS)
    left = rewritten("fuse-skip-layer-norm", model, SKIP_FEEDS, 1)
    assert left == {"MatMul": 1, "SkipLayerNormalization": 1, "Neg": 1}


def test_fuse_skip_layer_norm_before_earlier_users_of_the_sum() -> None:
    lines = SKIP.split("\n")
    lines[5], lines[6] = lines[6], lines[5]
    model = parsed("\n".join(lines), **SKIP_WEIGHTS)
    assert [node.op_type for node in model.graph][-2:] == ["Neg", "LayerNormalization"]
    rewritten("fuse-skip-layer-norm", model, SKIP_FEEDS, 1)


def test_fuse_skip_layer_norm_omits_an_unused_sum() -> None:
    model = parsed(SKIP.replace("Neg(s)", "Neg(x)"), **SKIP_WEIGHTS)
    rewritten("fuse-skip-layer-norm", model, SKIP_FEEDS, 1)
    node = next(node for node in model.graph if node.op_type == "SkipLayerNormalization")
    assert [bool(output.name) for output in node.outputs] in ([True], [True, False, False, False])


def test_fuse_skip_layer_norm_declines_a_broadcast_sum() -> None:
    text = SKIP.replace("float[batch, tokens, 8] x", "float[1, tokens, 8] x")
    reason = "the summands are not known to have the same shape"
    untouched("fuse-skip-layer-norm", parsed(text, **SKIP_WEIGHTS), reason)


# -- for CUDA --------------------------------------------------------------------------------------

GROUPS = """m (float[batch, 8, height, width] x, float[8, 1, 1] gamma, float[8, 1, 1] beta,
    float[2] ones, float[2] zeros) => (float[batch, 8, height, width] y)
<int64[3] cut = {0, 2, -1}>
{
  whole = Shape(x)
  flat = Reshape(x, cut)
  normed = InstanceNormalization<epsilon = 0.001>(flat, ones, zeros)
  back = Reshape(normed, whole)
  scaled = Mul(back, gamma)
  y = Add(scaled, beta)
}"""
SWISH = GROUPS.replace(
    "y = Add(scaled, beta)", "n = Add(scaled, beta)  s = Sigmoid(n)  y = Mul(n, s)"
)
LENGTH = (
    GROUPS.replace("height, width", "length")
    .replace("[8, 1, 1]", "[8, 1]")
    .replace("[2] ones", "[2] ones")
)
PLAIN = {"ones": np.ones(2, np.float32), "zeros": np.zeros(2, np.float32)}


def group_weights(trailing: int = 2) -> dict[str, Array]:
    shape = (8, *[1] * trailing)
    return {"gamma": random(*shape), "beta": random(*shape, seed=1), **PLAIN}


@pytest.mark.parametrize("text", [GROUPS, SWISH], ids=["plain", "swish"])
def test_fuse_group_norm(text: str) -> None:
    model = parsed(text, **group_weights())
    left = rewritten("fuse-group-norm", model, {"x": random(2, 8, 3, 5)}, 1)
    assert left == {"Transpose": 2, "GroupNorm": 1}
    norm = next(node for node in model.graph if node.op_type == "GroupNorm")
    assert norm.attributes.get_int("activation", -1) == (text is SWISH)
    assert all(value is not None and len(value.shape or ()) == 1 for value in norm.inputs[1:])


def test_fuse_group_norm_behind_other_passes() -> None:
    model = parsed(SWISH, **group_weights())
    PASSES["fuse-quick-gelu"](model)
    assert rewritten("fuse-group-norm", model, {"x": random(2, 8, 3, 5)}, 1)["QuickGelu"] == 0


def test_fuse_group_norm_over_one_length() -> None:
    model = parsed(LENGTH, **group_weights(1))
    PASSES["fold-constants"](model)
    left = rewritten("fuse-group-norm", model, {"x": random(2, 8, 7)}, 1)
    assert left == {"Unsqueeze": 1, "Transpose": 2, "GroupNorm": 1, "Reshape": 1}


def test_fuse_group_norm_declines_what_the_kernel_lacks() -> None:
    odd = GROUPS.replace("[2]", "[8]").replace("{0, 2, -1}", "{0, 8, -1}")
    plain = {"ones": np.ones(8, np.float32), "zeros": np.zeros(8, np.float32)}
    reason = "the kernel has no variant for 1 channels per group"
    untouched("fuse-group-norm", parsed(odd, **{**group_weights(), **plain}), reason)
    scaled = {**group_weights(), "ones": np.full(2, 2, np.float32)}
    untouched("fuse-group-norm", parsed(GROUPS, **scaled), "it scales or shifts its groups")


GEGLU = """m (float[batch, tokens, 2560] x, float[2560] b) => (float[batch, tokens, 1280] y)
{
  s = Add(x, b)
  left, right = Split<axis = -1, num_outputs = 2>(s)
  g = Gelu(right)
  y = Mul(left, g)
}"""


def test_fuse_geglu() -> None:
    model = parsed(GEGLU, b=random(2560, seed=3))
    assert rewritten("fuse-geglu", model, {"x": random(2, 3, 2560)}, 1) == {"BiasSplitGelu": 1}


def test_fuse_geglu_declines_the_other_half_and_other_widths() -> None:
    other = GEGLU.replace("Gelu(right)", "Gelu(left)").replace("Mul(left, g)", "Mul(right, g)")
    untouched("fuse-geglu", parsed(other, b=random(2560)), "it is not left * gelu(right)")
    small = GEGLU.replace("2560", "512").replace("1280", "256")
    untouched("fuse-geglu", parsed(small, b=random(512)), "the kernel has no variant for 256")


PACK = """m (float[batch, tokens, 8] x, float[batch, seen, 6] text,
    float[8, 12] wq, float[8, 12] wk, float[8, 12] wv, float[6, 12] tk, float[6, 12] tv,
    float[12] bq, float[12] bk, float[12] bv)
    => (float[batch, tokens, 12] y)
{
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  y = com.microsoft.MultiHeadAttention<num_heads = 3, scale = 0.5>(q, k, v)
}"""
CROSS = PACK.replace("MatMul(x, wk)", "MatMul(text, tk)").replace(
    "MatMul(x, wv)", "MatMul(text, tv)"
)
BIASED = PACK.replace("q, k, v)\n}", "qb, kb, vb)\n}").replace(
    "  y =", "  qb = Add(q, bq)\n  kb = Add(bk, k)\n  vb = Add(v, bv)\n  y ="
)
PACK_WEIGHTS = {
    **{name: random(8, 12, seed=place) for place, name in enumerate(("wq", "wk", "wv"))},
    **{name: random(6, 12, seed=place) for place, name in enumerate(("tk", "tv"))},
    **{name: random(12, seed=place) for place, name in enumerate(("bq", "bk", "bv"))},
}
PACK_FEEDS = {"x": random(2, 4, 8, seed=8), "text": random(2, 5, 6, seed=9)}


@pytest.mark.parametrize(
    ("text", "products", "inputs"), [(PACK, 1, 1), (CROSS, 2, 2), (BIASED, 1, 1)]
)
def test_pack_attention(text: str, products: int, inputs: int) -> None:
    model = parsed(text, **PACK_WEIGHTS)
    left = rewritten("pack-attention", model, PACK_FEEDS, 1)
    assert left["MatMul"] == products and left["Reshape"] == 1
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert len(node.inputs) == inputs
    shapes = {value.name: value.shape for value in node.inputs if value is not None}
    assert len(list(shapes.values())[-1] or ()) == 5
    assert any(str(node.name).startswith("block.to_") for node in model.graph)


def test_pack_attention_declines_keys_and_values_of_two_inputs() -> None:
    text = PACK.replace("MatMul(x, wk)", "MatMul(text, tk)")
    reason = "key and value have different inputs"
    untouched("pack-attention", parsed(text, **PACK_WEIGHTS), reason)


CHAIN = """m (float[batch, 4, height, width] x, float[batch, 6] time, float[6, 4, 3, 3] w1,
    float[6] b1, float[6, 6, 3, 3] w2, float[6, 1, 1] shift) => (float[batch, 12, tall, wide] y)
<float[4] scales = {1.0, 1.0, 2.0, 2.0}, int64[2] axes = {2, 3}, float half = {0.5}>
{
  a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1, b1)
  t = Unsqueeze(time, axes)
  c = Add(a, t)
  d = Sigmoid(c)
  e = Mul(c, d)
  f = Add(e, shift)
  g = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 1]>(f, w2)
  h = Mul(half, g)
  i = Add(h, a)
  j = Concat<axis = 1>(i, g)
  y = Resize<mode = "nearest", nearest_mode = "floor",
      coordinate_transformation_mode = "asymmetric">(j, , scales)
}"""
CHAIN_WEIGHTS = {
    "w1": random(6, 4, 3, 3),
    "b1": random(6),
    "w2": random(6, 6, 3, 3, seed=1),
    "shift": random(6, 1, 1, seed=2),
}
CHAIN_FEEDS = {"x": random(2, 4, 5, 7, seed=3), "time": random(2, 6, seed=4)}


def test_nhwc_conv() -> None:
    model = parsed(CHAIN, **CHAIN_WEIGHTS)
    left = rewritten("nhwc-conv", model, CHAIN_FEEDS, 2)
    assert left["Conv"] == 0 and left["NhwcConv"] == 2 and left["Transpose"] == 4
    assert isinstance(model.graph.initializers["w1/nhwc"].const_value, ir.LazyTensor)


def test_nhwc_conv_declines_computed_weights() -> None:
    untouched("nhwc-conv", parsed(CHAIN, b1=random(6)), "the weight is no constant")


def test_merge_transposes_leaves_one_at_each_end() -> None:
    model = parsed(CHAIN, **CHAIN_WEIGHTS)
    PASSES["nhwc-conv"](model)
    left = rewritten("merge-transposes", model, CHAIN_FEEDS, 9)
    assert left["Transpose"] == 2
    ends = [node.op_type for node in model.graph]
    assert ends[0] == ends[-1] == "Transpose"


def test_merge_transposes_declines_operators_that_depend_on_the_layout() -> None:
    text = """m (float[batch, height, width, 4] x) => (float[batch, 4, height, width] y)
    { a = Transpose<perm = [0, 3, 1, 2]>(x)  y = Softmax<axis = -1>(a) }"""
    untouched("merge-transposes", parsed(text), "Softmax depends on the layout")


def test_merge_transposes_exchanges_transposes_and_reshapes_to_tokens() -> None:
    text = """m (float[batch, height, width, 4] x, float[batch, 4, height, width] like)
        => (float[batch, height, width, 4] y, float[batch, tokens, 4] z)
    <int64[3] flat = {0, 4, -1}>
    { a = Transpose<perm = [0, 3, 1, 2]>(x)  b = Reshape(a, flat)
      z = Transpose<perm = [0, 2, 1]>(b)  c = Neg(z)  d = Transpose<perm = [0, 2, 1]>(c)
      whole = Shape(like)  e = Reshape(d, whole)
      f = Transpose<perm = [0, 2, 3, 1]>(e)  y = Neg(f) }"""
    feeds = {"x": random(2, 3, 5, 4), "like": random(2, 4, 3, 5)}
    left = rewritten("merge-transposes", parsed(text), feeds, 3)
    assert left == {"Reshape": 2, "Neg": 2, "Shape": 1, "Gather": 1}


# -- latentforge's operators -------------------------------------------------------------------

RESNET = """m (float[batch, 8, 5, 7] x, float[batch, 6] time, float[1, 6, 1, 1] pixel,
    float[6, 8, 3, 3] w1, float[6] b1, float[20, 6, 3, 3] w2, float[20, 8, 1, 1] w3,
    float[20, 20, 3, 3] w4, float[8, 1, 1] gamma, float[8, 1, 1] beta, float[6, 1, 1] gamma6,
    float[6, 1, 1] beta6, float[2] ones, float[2] zeros) => (float[batch, 20, 10, 14] y)
<int64[3] cut = {0, 2, -1}, int64[2] axes = {2, 3}, float[4] scales = {1, 1, 2, 2}>
{
  whole = Shape(x)  flat = Reshape(x, cut)  normed = InstanceNormalization(flat, ones, zeros)
  back = Reshape(normed, whole)  scaled = Mul(back, gamma)  n = Add(scaled, beta)
  s = Sigmoid(n)  act = Mul(n, s)
  c1 = Conv<pads = [1, 1, 1, 1]>(act, w1, b1)
  t = Unsqueeze(time, axes)
  a1 = Add(c1, t)
  whole2 = Shape(a1)  flat2 = Reshape(a1, cut)  normed2 = InstanceNormalization(flat2, ones, zeros)
  back2 = Reshape(normed2, whole2)  scaled2 = Mul(back2, gamma6)  n2 = Add(beta6, scaled2)
  c2 = Conv<pads = [1, 1, 1, 1]>(n2, w2)
  c3 = Conv(x, w3)
  sum = Add(c3, c2)
  up = Resize<mode = "nearest", nearest_mode = "floor",
      coordinate_transformation_mode = "asymmetric">(sum, , scales)
  y = Conv<pads = [1, 1, 1, 1]>(up, w4)
}"""
RESNET_WEIGHTS = {
    **{
        "w1": random(6, 8, 3, 3),
        "b1": random(6),
        "w2": random(20, 6, 3, 3),
        "w3": random(20, 8, 1, 1),
    },
    **{
        "w4": random(20, 20, 3, 3) / 10,
        "gamma6": random(6, 1, 1),
        "beta6": random(6, 1, 1, seed=1),
    },
    **group_weights(),
}
RESNET_FEEDS = {"x": random(2, 8, 5, 7), "time": random(2, 6), "pixel": random(1, 6, 1, 1)}
DECIMALS = 1e-4  # between float32 kernels and a float64 oracle, for sums of hundreds of terms


def resnet(*changes: tuple[str, str]) -> ir.Model:
    """Return the block with channels last, but not fused yet."""
    text = RESNET
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    model = parsed(text, **{name: array for name, array in RESNET_WEIGHTS.items() if name in text})
    optimize(model, {name: PASSES[name] for name in ("native-conv", "merge-transposes")})
    return model


def test_native_conv() -> None:
    model = parsed(RESNET, **RESNET_WEIGHTS)
    left = rewritten("native-conv", model, RESNET_FEEDS, 6, atol=DECIMALS)
    assert left["Conv"] == 4 and left["GroupNorm"] == 2 and left["Transpose"] == 12
    packed = model.graph.initializers["w2/packed"]
    assert isinstance(packed.const_value, ir.LazyTensor) and packed.shape == (2, 6, 3, 3, 16)
    convs = [node for node in model.graph if node.op_type == "Conv"]
    assert [node.name for node in convs] == [f"block/{name}" for name in ("c1", "c2", "c3", "y")]
    assert str(convs[0].outputs[0].shape) == "[batch,5,7,6]"


PADDED = "pads = [1, 1, 1, 1]>(x, w1"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (PADDED, "pads = [2, 2, 2, 2], dilations = [2, 2]>(x, w1", "it is dilated or grouped"),
        (PADDED, "pads = [1, 1, 1, 1], strides = [1, 2]>(x, w1", "its strides are (1, 2)"),
        (PADDED, 'auto_pad = "SAME_UPPER">(x, w1', "its padding is automatic"),
        (PADDED, "pads = [1, 1, 3, 1]>(x, w1", "its pads are (1, 1, 3, 1), not 0 to 2"),
        ("float[6, 4, 3, 3] w1", "float[6, 4, 1, 1] w1", "its pads are (1, 1, 1, 1), not 0 to 0"),
        ("float[6, 4, 3, 3] w1", "float[6, 4, 5, 5] w1", "its kernel is (5, 5)"),
        ("float[6, 4, 3, 3] w1", "float[6, 2, 3, 3] w1", "it is dilated or grouped"),
    ],
)
def test_native_conv_declines_what_it_has_no_kernel_for(old: str, new: str, reason: str) -> None:
    text = """m (float[batch, 4, height, width] x, float[6, 4, 3, 3] w1)
        => (float[batch, 6, tall, wide] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w1) }"""
    assert old in text
    text = text.replace(old, new)
    groups = "2, 3, 3] w1" in text
    text = text.replace("<pads", "<group = 2, pads") if groups else text
    side = next(side for side in (1, 3, 5) if f"{side}, {side}] w1" in text)
    weight = random(6, 2 if groups else 4, side, side)
    untouched("native-conv", parsed(text, w1=weight), reason)
    untouched("native-conv", parsed(text), "weight and bias are no float32 constants")


def test_fuse_conv() -> None:
    model = resnet()
    left = rewritten("fuse-conv", model, RESNET_FEEDS, 5, atol=DECIMALS)
    assert left == {"Conv": 4, "GroupScale": 2, "Transpose": 3}
    inputs = {
        str(node.name): [place for place, value in enumerate(node.inputs) if value is not None]
        for node in model.graph
        if node.op_type == "Conv"
    }
    assert inputs == {
        "block/c1": [0, 1, 2, 3, 4, 5],
        "block/c2": [0, 1, 3, 4],
        "block/c3": [0, 1, 6],
        "block/y": [0, 1],
    }
    first, last = (next(n for n in model.graph if n.name == f"block/{x}") for x in ("c1", "y"))
    assert first.attributes.get_int("silu", -1) == 1
    assert last.attributes.get_int("upsample", -1) == 2


def test_fuse_conv_enlarges_to_a_size() -> None:
    """As the last upsampling of a UNet does whose sides are odd."""
    sized = (
        "up = Resize",
        "front = Shape<end = 2>(sum)  sizes = Concat<axis = 0>(front, skip)\n  up = Resize",
    )
    changes = [sized, ("(sum, , scales)", "(sum, , , sizes)"), ("20, 10, 14] y", "20, 9, 14] y")]
    model = resnet(*changes, ("<int64[3] cut", "<int64[2] skip = {9, 14}, int64[3] cut"))
    assert [node.op_type for node in model.graph].count("Transpose") == 3
    left = rewritten("fuse-conv", model, RESNET_FEEDS, 5, atol=DECIMALS)
    assert left["Conv"] == 4 and left["Transpose"] == 3 and "Resize" not in left
    (last,) = (node for node in model.graph if node.name == "block/y")
    assert [place for place, value in enumerate(last.inputs) if value is not None] == [0, 1, 7]
    assert last.attributes.get_int("upsample", 0) == 1


def test_fuse_conv_adds_a_single_pixel_as_a_row() -> None:
    model = resnet(("Add(c1, t)", "Add(pixel, c1)"))
    left = rewritten("fuse-conv", model, RESNET_FEEDS, 5, atol=DECIMALS)
    assert left == {"Conv": 4, "GroupScale": 2, "Transpose": 3, "Squeeze": 1}


@pytest.mark.parametrize(
    ("old", "new", "left", "reason"),
    [
        (
            "Conv(x, w3)",
            "Conv<strides = [1, 1]>(n, w3)  more = Neg(n)",
            {"Mul", "Sigmoid"},
            "its output is consumed by Sigmoid, not by Conv alone",
        ),
        ("y = Conv<pads = [1, 1, 1, 1]>(up, w4)", "y = Neg(up)", {"Resize", "Neg"}, None),
        (
            "{1, 1, 2, 2}",
            "{1, 1, 3, 3}",
            {"Resize"},
            "the Resize before it neither doubles nor is to a size, by nearest neighbours",
        ),
        ("Add(c3, c2)", "Mul(c3, c2)", {"Mul"}, None),
    ],
)
def test_fuse_conv_declines_what_other_nodes_use(
    old: str, new: str, left: set[str], reason: str | None
) -> None:
    model = resnet((old, new))
    with collect_declined() as declined:
        count = PASSES["fuse-conv"](model)
    assert 0 < count < 5
    assert reason is None or reason in declined, declined
    assert {node.op_type for node in model.graph if not node.domain} - {"Transpose"} == left


FEED_FORWARD = """m (float[batch, tokens, 12] x, float[12, 96] w, float[96] b, float[48, 12] v,
    float[batch, tokens, 96] r) => (float[batch, tokens, 12] y)
<int64[2] sizes = {48, 48}>
{
  p = MatMul(x, w)
  s = Add(b, p)
  left, right = Split<axis = -1>(s, sizes)
  g = Gelu(right)
  h = Mul(left, g)
  q = MatMul(h, v)
  y = Add(q, x)
}"""
FEED_FORWARD_WEIGHTS = {"w": random(12, 96), "b": random(96, seed=1), "v": random(48, 12) / 7}


def feed_forward(*changes: tuple[str, str]) -> ir.Model:
    text = FEED_FORWARD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parsed(text, **FEED_FORWARD_WEIGHTS)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [("Split<axis = -1>(s, sizes)", "Split<axis = 2, num_outputs = 2>(s)")],
        [("Mul(left, g)", "Mul(g, left)")],
        [("Split<axis = -1>(s, sizes)", "Split<axis = -1>(p, sizes)"), ("s = Add(b, p)", "")],
    ],
)
def test_native_geglu(changes: list[tuple[str, str]]) -> None:
    model = feed_forward(*changes)
    feeds = {"x": random(2, 5, 12), "r": random(2, 5, 96)}
    bias = "b" in {value.name for node in model.graph for value in node.inputs if value}
    rewritten("native-product", model, feeds, 3 + bias, atol=DECIMALS)
    assert rewritten("native-geglu", model, feeds, 1, atol=DECIMALS) == {"MatMul": 2}
    first, second = model.graph
    assert (first.name, second.name) == ("block/p", "block/q")
    assert str(first.outputs[0].shape) == "[batch,tokens,48]"
    assert [node.attributes.get_int("gated", 0) for node in model.graph] == [1, 0]
    packed = first.inputs[1]
    assert packed is not None and isinstance(packed.const_value, ir.LazyTensor)


def test_native_product_adds_nothing_to_a_gated_product() -> None:
    model = feed_forward(
        ("float[batch, tokens, 96] r", "float[batch, tokens, 48] r"),
        ("q = MatMul(h, v)", "more = Add(h, r)  q = MatMul(more, v)"),
    )
    feeds = {"x": random(2, 5, 12), "r": random(2, 5, 48)}
    rewritten("native-product", model, feeds, 4, atol=DECIMALS)
    left = rewritten("native-geglu", model, feeds, 1, atol=DECIMALS)
    assert left == {"MatMul": 2, "Add": 1}
    untouched("native-product", model)


def test_native_geglu_of_a_shared_weight() -> None:
    text = """m (float[batch, tokens, 12] x, float[12, 96] w, float[96] b)
        => (float[batch, tokens, 48] y, float[batch, tokens, 96] z)
    {
      p = MatMul(x, w)  s = Add(p, b)  left, right = Split<axis = -1, num_outputs = 2>(s)
      g = Gelu(right)  y = Mul(left, g)
      q = MatMul(x, w)  z = Add(q, b)
    }"""
    model = parsed(text, w=random(12, 96), b=random(96))
    rewritten("native-product", model, {"x": random(2, 5, 12)}, 4)
    assert rewritten("native-geglu", model, {"x": random(2, 5, 12)}, 1) == {"MatMul": 2}


def test_native_product_takes_a_bias_and_a_residual() -> None:
    text = """m (float[batch, tokens, 12] x, float[12, 12] w, float[12] b)
        => (float[batch, tokens, 12] y) { p = MatMul(x, w)  s = Add(b, p)  y = Add(s, x) }"""
    model = parsed(text, w=random(12, 12), b=random(12))
    assert rewritten("native-product", model, {"x": random(2, 5, 12)}, 3) == {"MatMul": 1}


SHARED = "the product or one of its halves has another consumer"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Gelu(right)", 'Gelu<approximate = "tanh">(right)', "the GELU is approximated"),
        ("Gelu(right)", "Gelu(left)", "it is not left * gelu(right)"),
        ("Mul(left, g)", "Mul(right, g)", "it is not left * gelu(right)"),
        ("Mul(left, g)", "Add(left, g)", "the GELU is not consumed by one Mul"),
        (
            "q = MatMul(h, v)",
            "n = Neg(g)  a = Add(h, n)  q = MatMul(a, v)",
            "the GELU is not consumed by one Mul",
        ),
        ("q = MatMul(h, v)", "n = Neg(left)  a = Add(h, n)  q = MatMul(a, v)", SHARED),
        ("q = MatMul(h, v)", "n = Neg(right)  a = Add(h, n)  q = MatMul(a, v)", SHARED),
        ("q = MatMul(h, v)", "n = ReduceMean(s)  a = Add(h, n)  q = MatMul(a, v)", SHARED),
        ("s = Add(b, p)", "s = Add(r, p)", "the product adds a residual"),
        ("s = Add(b, p)", "s = Neg(p)", "the Split is not of a latentforge MatMul's output"),
    ],
)
def test_native_geglu_declines_other_gates(old: str, new: str, reason: str) -> None:
    model = feed_forward((old, new))
    assert PASSES["native-product"](model) > 0
    untouched("native-geglu", model, reason)


def test_native_geglu_declines_halves_that_are_not_whole_blocks() -> None:
    odd = FEED_FORWARD.replace("96", "80").replace("48", "40")
    model = parsed(odd, w=random(12, 80), b=random(80), v=random(40, 12))
    PASSES["native-product"](model)
    untouched("native-geglu", model, "80 channels are not two halves of whole blocks of 16")
    assert kinds(model) == {"MatMul": 2, "Split": 1, "Gelu": 1, "Mul": 1}


ATTEND = """m (float[batch, tokens, 12] q, float[batch, seen, 12] k, float[batch, seen, 12] v)
    => (float[batch, tokens, 12] y)
{ y = com.microsoft.MultiHeadAttention<num_heads = 3, scale = 0.5>(q, k, v) }"""


def test_native_attention() -> None:
    model = parsed(ATTEND)
    assert rewritten("native-attention", model, qkv(), 1) == {"Attention": 1}
    (node,) = model.graph
    assert node.domain == "latentforge" and node.name == "block/y"
    assert node.attributes["heads"].as_int() == 3 and node.attributes["scale"].as_float() == 0.5


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("scale = 0.5", "scale = 0.5, unidirectional = 1", "it is causal"),
        (", scale = 0.5", "", "it has no explicit scale"),
        ("seen, 12] v", "seen, 9] v", "the heads of its keys and values differ in size"),
        ("(q, k, v) }", "(q, k, v, b) }", "it has a mask or bias"),
    ],
)
def test_native_attention_declines_other_attentions(old: str, new: str, reason: str) -> None:
    text = ATTEND.replace("12] v)", "12] v, float[36] b)")
    assert old in text
    untouched("native-attention", parsed(text.replace(old, new)), reason)


# -- runner ----------------------------------------------------------------------------------------


def test_passes_stop() -> None:
    counts = optimize(parsed(GELU), PASSES)
    assert +counts == {"fuse-gelu": 1}
    assert set(counts) == set(PASSES)


def test_the_log_lists_rewrites_and_reasons(caplog: pytest.LogCaptureFixture) -> None:
    """Each reason of the last round is listed once, with the nodes that were declined for it."""
    model = parsed(GELU.replace("0.5", "0.25"))
    for node in list(model.graph):
        if node.op_type == "Erf":
            copies = [ir.Node("", "Erf", node.inputs, name=f"block/e{i}") for i in range(7)]
            model.graph.insert_after(node, copies)
            model.graph.outputs.extend(copy.outputs[0] for copy in copies)
    names = ("fuse-gelu", "fuse-quick-gelu")
    with caplog.at_level(logging.DEBUG, logger="latentforge"):
        optimize(model, {name: PASSES[name] for name in names})
    assert [record.message for record in caplog.records] == [
        "fuse-gelu: 0 rewritten, 8 declined",
        "    8 declined: the nodes around the Erf are not those of a GELU: "
        "block/b, block/e0, block/e1, block/e2, block/e3 and 3 more",
        "fuse-quick-gelu: 0 rewritten, 0 declined",
    ]


def test_a_match_that_succeeds_later_is_not_listed_as_declined(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = feed_forward()
    names = ("native-geglu", "native-product")
    with caplog.at_level(logging.DEBUG, logger="latentforge"):
        counts = optimize(model, {name: PASSES[name] for name in names})
    assert counts["native-geglu"] == 1
    assert "native-geglu: 1 rewritten, 0 declined" in caplog.messages


def test_reasons_are_collected_only_on_demand(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="latentforge"):
        optimize(parsed(GELU.replace("0.5", "0.25")), {"fuse-gelu": PASSES["fuse-gelu"]})
    assert not caplog.records


SUBGRAPH = """m (bool c, float[n] x) => (float[n] y)
{ y = If<then_branch = one () => (float[n] a) { s = Sigmoid(x)  a = Mul(s, x) },
         else_branch = two () => (float[n] b) { b = Neg(x) }>(c) }"""


def test_subgraphs_are_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = parsed(SUBGRAPH)
    with caplog.at_level(logging.DEBUG, logger="latentforge"):
        counts = optimize(model, {"fuse-quick-gelu": PASSES["fuse-quick-gelu"]})
    assert counts.total() == 0
    assert "no pass visits the subgraph of block/y (If)" in caplog.messages


def test_exported_components_have_neither_subgraphs_nor_functions(tiny_engines: Path) -> None:
    for path in tiny_engines.glob("*.onnx"):
        model = ir.load(path)
        assert not model.functions
        assert len(list(model.graph.all_nodes())) == len(model.graph)


def test_debug_lists_passes_on_the_command_line(tiny_engines: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "latentforge", "--debug", "optimize", str(tiny_engines), "out"]
    options = ["--steps", "1", "--repeats", "0", "--gate", "images=1"]
    result = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert "latentforge: fuse-attention: 8 rewritten, 0 declined" in lines
    reason = "declined: several sizes of its target are not those of its input: "
    assert any(reason in line for line in lines), result.stderr
