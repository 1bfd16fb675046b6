"""What is useless by construction has to go, shapes have to shrink, and nothing else may change."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from latentforge.optimize.graph import layers
from latentforge.optimize.graph_io import save_graph
from latentforge.optimize.prune.blocks import branches, parameters
from latentforge.optimize.prune.channels import mlps
from latentforge.optimize.prune.heads import attentions
from latentforge.optimize.prune.pruning import prune
from latentforge.optimize.prune.records import PruneSettings, Removed, SparsitySettings
from latentforge.optimize.prune.sparsity import is_sparse24, sparsify
from latentforge.runtime.errors import SettingsError

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> ir.Model:
    """Parse ONNX text, turn the named inputs into weights, and infer all shapes."""
    model = ir.from_onnx_text(HEADER + text)
    values = {value.name: value for value in model.graph.inputs}
    for name, array in weights.items():
        values[name].const_value = ir.tensor(array, name=name)
        model.graph.inputs.remove(values[name])
        model.graph.register_initializer(values[name])
    for node in model.graph:
        node.name = f"{node.outputs[0].name}/{node.op_type}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Save and check a model, infer its shapes strictly, and return its first output."""
    path = folder / "m.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    return np.asarray(ort.InferenceSession(path).run(None, feeds)[0])


def shapes(model: ir.Model) -> dict[str, list[int]]:
    return {
        name: list(v.const_value.shape.numpy())
        for name, v in model.graph.initializers.items()
        if v.const_value is not None
    }


BLOCKS = """m (float[2,4,8] x, float[8,8] {0}_in, float[8,8] {0}_out, float[8,8] {1}_in,
  float[8,8] {1}_out, float[8,8] {2}_in, float[8,8] {2}_out) => (float[2,4,8] y)
{{ a = MatMul(x, {0}_in)  b = Tanh(a)  c = MatMul(b, {0}_out)  d = Add(x, c)
  e = MatMul(d, {1}_in)  f = Tanh(e)  g = MatMul(f, {1}_out)  h = Add(g, d)
  i = MatMul(h, {2}_in)  j = Tanh(i)  k = MatMul(j, {2}_out)  y = Add(h, k) }}""".format(
    "first", "second", "third"
)


def blocks(*scales: float) -> ir.Model:
    """Build three residual branches whose contributions are scaled."""
    weights = {}
    for seed, (name, scale) in enumerate(zip(("first", "second", "third"), scales, strict=True)):
        weights[f"{name}_in"] = normal(8, 8, seed=seed)
        weights[f"{name}_out"] = scale * normal(8, 8, seed=10 + seed)
    return build(BLOCKS, **weights)


X = {"x": normal(2, 4, 8, seed=20)}


@pytest.mark.parametrize(("useless", "branch"), [(0, "c"), (1, "g"), (2, "k")])
def test_a_branch_that_contributes_nothing_is_removed(
    useless: int, branch: str, tmp_path: Path
) -> None:
    model = blocks(*(0.0 if index == useless else 1.0 for index in range(3)))
    expected = run(model, tmp_path, X)
    removed = prune(model, PruneSettings(blocks=0.34), feeds=[X])
    assert [(r.kind, r.score, r.parameters) for r in removed] == [("block", 0.0, 128)]
    assert parameters(model.graph) == 256
    assert branch not in {node.outputs[0].name for node in model.graph}
    np.testing.assert_array_equal(run(model, tmp_path, X), expected)


def test_a_score_is_the_mean_squared_change_of_the_output(tmp_path: Path) -> None:
    model = blocks(1.0, 0.01, 1.0)
    whole = run(model, tmp_path, X)
    (removed,) = prune(model, PruneSettings(blocks=0.34), feeds=[X])
    pruned = run(model, tmp_path, X)
    np.testing.assert_array_equal(pruned, run(blocks(1.0, 0.0, 1.0), tmp_path, X))
    assert removed.name == "h/Add"
    assert removed.score == pytest.approx(np.mean((whole - pruned) ** 2), rel=1e-4)
    assert removed.score > 0


def test_scores_are_averages_over_all_inputs() -> None:
    quiet, loud = {"x": np.zeros_like(X["x"])}, X
    scores = [
        prune(blocks(1.0, 0.01, 1.0), PruneSettings(blocks=0.34), feeds=feeds)[0].score
        for feeds in ([loud], [loud, quiet])
    ]
    assert scores[1] == pytest.approx(scores[0] / 2)


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.3, 0), (0.34, 1), (0.6, 1), (0.67, 2), (0.99, 2)]
)
def test_no_more_than_the_fraction_is_removed(fraction: float, count: int) -> None:
    removed = prune(blocks(1.0, 0.1, 0.01), PruneSettings(blocks=fraction), feeds=[X])
    assert len(removed) == count
    assert [r.score for r in removed] == sorted(r.score for r in removed)


def test_excluded_branches_stay() -> None:
    model = blocks(1.0, 0.0, 1.0)
    removed = prune(model, PruneSettings(blocks=0.34, exclude=("g/*",)), feeds=[X])
    assert removed and removed[0].score > 0
    assert "g" in {node.outputs[0].name for node in model.graph}


NESTED = """m (float[2,4,8] x, float[8,8] before, float[8,8] inner, float[8,8] after)
  => (float[2,4,8] y)
{ a = MatMul(x, before)  b = MatMul(a, inner)  c = Add(a, b)  d = MatMul(c, after)
  e = Add(x, d)  y = Tanh(e) }"""


@pytest.mark.parametrize(
    ("scales", "sizes"),
    [({"after": 0.0}, [192]), ({"inner": 0.0}, [64, 128]), ({}, [192])],
)
def test_a_branch_inside_a_branch(scales: dict[str, float], sizes: list[int]) -> None:
    weights = {name: scales.get(name, 1.0) * normal(8, 8) for name in ("before", "inner", "after")}
    model = build(NESTED, **weights)
    assert [parameters(model.graph, b.nodes) for b in branches(model.graph)] == [64, 192]
    inner_only = prune(model.clone(), PruneSettings(blocks=0.34), feeds=[X])
    assert [r.parameters for r in inner_only] == [64]
    model.graph.register_initializer(_more_weights())  # so that all of the branch may go
    removed = prune(model, PruneSettings(blocks=0.99), feeds=[X])
    assert sum(r.parameters for r in removed) == 192
    if scales:
        assert [r.parameters for r in removed] == sizes


def _more_weights() -> ir.Value:
    return ir.Value(name="more", const_value=ir.tensor(normal(64, 64), name="more"))


def test_other_sums_are_no_candidates() -> None:
    text = """m (float[2,4,8] x, float[2,1,8] small, float[8,8] v, float[8,8] w) => (float[2,4,8] y)
    { a = MatMul(x, v)  b = MatMul(x, w)  c = Add(a, b)  d = ReduceMean <keepdims = 1> (c)
      y = Add(c, d) }"""
    assert not branches(build(text, v=normal(8, 8), w=normal(8, 8)).graph)


GEGLU = """m (float[2,4,8] x, float[8,64] up, float[64] bias, float[32,8] down) => (float[2,4,8] y)
<int64[2] halves = {32, 32}>
{ a = MatMul(x, up)  b = Add(a, bias)  v, g = Split <axis = -1> (b, halves)
  h = Gelu(g)  m = Mul(v, h)  y = MatMul(m, down) }"""


def geglu(**changes: np.ndarray) -> ir.Model:
    weights = {"up": normal(8, 64), "bias": normal(64, seed=1), "down": normal(32, 8, seed=2)}
    return build(GEGLU, **{**weights, **changes})


def test_channels_that_contribute_nothing_are_removed(tmp_path: Path) -> None:
    down = normal(32, 8, seed=2)
    down[1::4] = 0
    model = geglu(down=down)
    expected = run(model, tmp_path, X)
    (removed,) = prune(model, PruneSettings(channels=0.25), feeds=[X])
    assert removed == Removed(kind="channels", name="a", score=0.0, parameters=8 * (16 + 2 + 8))
    assert shapes(model) == {"up": [8, 48], "bias": [48], "down": [24, 8], "halves": [2]}
    np.testing.assert_allclose(run(model, tmp_path, X), expected, rtol=1e-5, atol=1e-5)


def test_the_channels_of_least_contribution_are_removed(tmp_path: Path) -> None:
    """Compare with the score computed in numpy."""
    model = geglu()
    feeds = [X, {"x": 2 * X["x"][::-1]}]
    hidden_model = model.clone()
    hidden_model.graph.outputs[:] = [
        v for n in hidden_model.graph for v in n.outputs if v.name == "m"
    ]
    hidden = np.concatenate([run(hidden_model, tmp_path, fed).reshape(-1, 32) for fed in feeds])
    down = model.graph.initializers["down"].const_value
    assert down is not None
    scores = np.mean(hidden**2, axis=0) * np.sum(down.numpy() ** 2, axis=1)
    kept = np.sort(np.argsort(-scores)[:16])
    (removed,) = prune(model, PruneSettings(channels=0.5), feeds=feeds)
    pruned = model.graph.initializers["down"].const_value
    assert pruned is not None
    np.testing.assert_array_equal(pruned.numpy(), down.numpy()[kept])
    expected = hidden[:8][:, kept] @ down.numpy()[kept]
    found = run(model, tmp_path, X).reshape(-1, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert removed.score == pytest.approx(np.delete(scores, kept).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("fraction", "multiple", "remaining"),
    [(0.01, 8, 32), (0.2, 8, 32), (0.25, 8, 24), (0.3, 8, 24), (0.3, 1, 22), (0.99, 8, 8)],
)
def test_the_remaining_channels_are_a_multiple(
    fraction: float, multiple: int, remaining: int
) -> None:
    model = geglu()
    prune(model, PruneSettings(channels=fraction, channel_multiple=multiple), feeds=[X])
    assert shapes(model)["down"] == [remaining, 8]
    assert shapes(model)["up"] == [8, 2 * remaining]


def test_an_mlp_without_gates(tmp_path: Path) -> None:
    text = """m (float[2,4,8] x, float[8,32] up, float[32] bias, float[32,8] down)
      => (float[2,4,8] y)
    <float slope = {1.702}>
    { a = MatMul(x, up)  b = Add(bias, a)  s = Mul(b, slope)  g = Sigmoid(s)  h = Mul(b, g)
      y = MatMul(h, down) }"""
    down = normal(32, 8)
    down[:16] = 0
    model = build(text, up=normal(8, 32), bias=normal(32), down=down)
    expected = run(model, tmp_path, X)
    prune(model, PruneSettings(channels=0.5), feeds=[X])
    assert shapes(model) == {"up": [8, 16], "bias": [16], "down": [16, 8], "slope": []}
    np.testing.assert_allclose(run(model, tmp_path, X), expected, rtol=1e-5, atol=1e-5)


def test_hidden_channels_with_other_uses_stay() -> None:
    text = """m (float[2,4,8] x, float[8,32] up, float[32,8] down)
      => (float[2,4,8] y, float[2,4,32] h)
    { a = MatMul(x, up)  h = Gelu(a)  y = MatMul(h, down) }"""
    weights = {"up": normal(8, 32), "down": normal(32, 8)}
    assert not mlps(build(text, **weights).graph)
    assert mlps(build(text.replace(", float[2,4,32] h", ""), **weights).graph)


FUSED = """m (float[2,4,8] x, float[8,12] q, float[8,12] k, float[8,24] v, float[24] bias,
  float[24,8] o) => (float[2,4,8] y)
{ a = MatMul(x, q)  b = MatMul(x, k)  c = MatMul(x, v)  d = Add(c, bias)
  e = com.microsoft.MultiHeadAttention <num_heads = 3> (a, b, d)  y = MatMul(e, o) }"""

UNFUSED = """m (float[2,4,8] x, float[8,12] q, float[8,12] k, float[8,24] v, float[24] bias,
  float[24,8] o) => (float[2,4,8] y)
<int64[4] narrow = {2, 4, 3, 4}, int64[4] wide = {2, 4, 3, 8}, int64[3] joined = {2, 4, 24},
 float scale = {0.5}>
{ a = MatMul(x, q)  b = MatMul(x, k)  c = MatMul(x, v)  d = Add(c, bias)
  a1 = Reshape(a, narrow)  a2 = Transpose <perm = [0, 2, 1, 3]> (a1)  a3 = Mul(a2, scale)
  b1 = Reshape(b, narrow)  b2 = Transpose <perm = [0, 2, 3, 1]> (b1)
  d1 = Reshape(d, wide)  d2 = Transpose <perm = [0, 2, 1, 3]> (d1)
  s = MatMul(a3, b2)  p = Softmax(s)  e = MatMul(p, d2)
  f = Transpose <perm = [0, 2, 1, 3]> (e)  g = Reshape(f, joined)  y = MatMul(g, o) }"""


def attention(text: str, **changes: np.ndarray) -> ir.Model:
    weights = {
        "q": normal(8, 12, seed=1),
        "k": normal(8, 12, seed=2),
        "v": normal(8, 24, seed=3),
        "bias": normal(24, seed=4),
        "o": normal(24, 8, seed=5),
    }
    model = build(text, **{**weights, **changes})
    for node in model.graph:  # onnx does not infer this shape
        if node.op_type == "MultiHeadAttention":
            node.outputs[0].shape, node.outputs[0].dtype = ir.Shape([2, 4, 24]), ir.DataType.FLOAT
    return model


@pytest.mark.parametrize("text", [FUSED, UNFUSED], ids=["fused", "unfused"])
@pytest.mark.parametrize("useless", [0, 1, 2])
def test_a_head_that_contributes_nothing_is_removed(
    text: str, useless: int, tmp_path: Path
) -> None:
    output = normal(24, 8, seed=5)
    output[useless * 8 : useless * 8 + 8] = 0
    model = attention(text, o=output)
    expected = run(model, tmp_path, X)
    (removed,) = prune(model, PruneSettings(heads=0.34), feeds=[X])
    assert (removed.kind, removed.score, removed.parameters) == ("heads", 0.0, 200)
    found = shapes(model)
    assert [found[name] for name in "qkvo"] == [[8, 8], [8, 8], [8, 16], [16, 8]]
    assert found["bias"] == [16]
    np.testing.assert_allclose(run(model, tmp_path, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", [FUSED, UNFUSED], ids=["fused", "unfused"])
def test_a_head_score_is_its_mean_squared_contribution(text: str, tmp_path: Path) -> None:
    changes = []
    for head in range(3):
        output = normal(24, 8, seed=5)
        output[head * 8 : head * 8 + 8] = 0
        whole, without = attention(text), attention(text, o=output)
        difference = run(whole, tmp_path, X) - run(without, tmp_path, X)
        changes.append(float(np.square(difference).sum(axis=-1).mean()))
    (removed,) = prune(attention(text), PruneSettings(heads=0.34), feeds=[X])
    assert removed.score == pytest.approx(min(changes), rel=1e-4)


def test_one_head_remains(tmp_path: Path) -> None:
    model = attention(FUSED)
    prune(model, PruneSettings(heads=0.99), feeds=[X])
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert node.attributes.get_int("num_heads") == 1
    run(model, tmp_path, X)


@pytest.mark.parametrize("text", [FUSED, UNFUSED], ids=["fused", "unfused"])
def test_excluded_attention_stays(text: str) -> None:
    graph = attention(text).graph
    assert len(attentions(graph)) == 1
    assert not attentions(graph, exclude=["b/*"])


LINEAR = "m (float[2,4,8] x, float[8,8] w) => (float[2,4,8] y) { y = MatMul(x, w) }"


def test_two_of_four_input_channels_remain() -> None:
    weight = np.tile(np.array([[1], [-4], [3], [2]], np.float32), (2, 8))
    weight[4:] = [[-8], [5], [6], [7]]
    model = build(LINEAR, w=weight)
    (record,) = sparsify(model, SparsitySettings())
    kept = [[0], [-4], [3], [0], [-8], [0], [0], [7]]
    (layer,) = layers(model.graph)
    np.testing.assert_array_equal(layer.array, np.tile(np.array(kept, np.float32), (1, 8)))
    assert record.parameters == 32 and record.name == "y/MatMul"
    assert record.score == pytest.approx((1 + 4 + 25 + 36) / (1 + 16 + 9 + 4 + 64 + 25 + 36 + 49))
    assert is_sparse24(layer.array, 0) and not is_sparse24(weight, 0)
    assert sparsify(model, SparsitySettings()) == []


def test_large_inputs_make_small_weights_important() -> None:
    weight = np.tile(np.array([[1], [4], [3], [2]], np.float32), (2, 8))
    x = np.ones((2, 4, 8), np.float32)
    x[..., 0] = 10
    model = build(LINEAR, w=weight)
    sparsify(model, SparsitySettings(score="activation"), feeds=[{"x": x}])
    (layer,) = layers(model.graph)
    np.testing.assert_array_equal(layer.array[:, 0], [1, 4, 0, 0, 0, 4, 3, 0])


def test_convolutions_are_sparse_over_input_channels() -> None:
    text = """m (float[1,8,5,5] x, float[6,8,3,3] w) => (float[1,6,5,5] y)
    { y = Conv <pads = [1, 1, 1, 1]> (x, w) }"""
    weight = normal(6, 8, 3, 3)
    x = normal(1, 8, 5, 5) * np.arange(1, 9, dtype=np.float32).reshape(1, 8, 1, 1)
    model = build(text, w=weight)
    sparsify(model, SparsitySettings(score="activation"), feeds=[{"x": x}])
    (layer,) = layers(model.graph)
    assert is_sparse24(layer.array, 1) and not is_sparse24(layer.array, 0)
    scores = np.abs(weight) * np.sqrt(np.mean(x**2, axis=(0, 2, 3))).reshape(1, 8, 1, 1)
    for part in (slice(0, 4), slice(4, 8)):
        threshold = np.sort(scores[:, part], axis=1)[:, 2:3]
        kept = np.where(scores[:, part] >= threshold, weight[:, part], 0)
        np.testing.assert_array_equal(layer.array[:, part], kept)


def test_odd_and_excluded_layers_stay_dense() -> None:
    text = """m (float[2,4,6] x, float[6,8] odd, float[8,8] even) => (float[2,4,8] y)
    { a = MatMul(x, odd)  y = MatMul(a, even) }"""
    weights = {"odd": normal(6, 8), "even": normal(8, 8)}
    names = [
        [record.name for record in sparsify(build(text, **weights), settings)]
        for settings in (SparsitySettings(), SparsitySettings(exclude=("y/*",)))
    ]
    assert names == [["y/MatMul"], []]


def test_a_weight_that_two_layers_share_is_sparse_for_each(tmp_path: Path) -> None:
    text = """m (float[2,4,8] x, float[8,8] w) => (float[2,4,8] y)
    { a = MatMul(x, w)  b = Tanh(a)  y = MatMul(b, w) }"""
    model = build(text, w=normal(8, 8))
    assert len(sparsify(model, SparsitySettings())) == 2
    assert all(is_sparse24(layer.array, 0) for layer in layers(model.graph))
    run(model, tmp_path, X)


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": 1.0},
        {"channels": -0.1},
        {"heads": float("nan")},
        {"channel_multiple": 0},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"prune: {next(iter(settings))} (has to|must) be"):
        PruneSettings(**settings)


def test_bad_score_is_refused() -> None:
    with pytest.raises(SettingsError, match="magnitude or activation, not 'random'"):
        SparsitySettings(score="random")  # type: ignore[arg-type]


def test_scores_need_recorded_inputs() -> None:
    for model, settings in (
        (blocks(1.0, 1.0, 1.0), PruneSettings(blocks=0.5)),
        (geglu(), PruneSettings(channels=0.5)),
        (attention(FUSED), PruneSettings(heads=0.5)),
    ):
        with pytest.raises(SettingsError, match="got none; calibrate"):
            prune(model, settings, feeds=[])
    with pytest.raises(SettingsError, match="got none; calibrate"):
        sparsify(build(LINEAR, w=normal(8, 8)), SparsitySettings(score="activation"))


def test_weights_in_external_data_are_pruned(tmp_path: Path) -> None:
    ir.save(geglu(), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    (tmp_path / "folder").mkdir()
    outside, inside = ir.load(tmp_path / "m.onnx"), geglu()
    folder = tmp_path / "folder"
    removed = [prune(model, PruneSettings(channels=0.5), feeds=[X]) for model in (outside, inside)]
    assert removed[0] == removed[1]
    save_graph(outside, folder / "pruned.onnx")
    found = ort.InferenceSession(folder / "pruned.onnx").run(None, X)[0]
    np.testing.assert_array_equal(found, run(inside, folder, X))


def test_no_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prune(geglu(), PruneSettings(blocks=0.5, channels=0.5, heads=0.5), feeds=[X])
    assert list(tmp_path.iterdir()) == []


def unet_feeds(count: int) -> list[dict[str, np.ndarray]]:
    return [
        {
            "sample": normal(2, 4, 16, 16, seed=seed),
            "timestep": np.array([981.0 - 400 * seed], np.float32),
            "encoder_hidden_states": normal(2, 24, 32, seed=seed),
        }
        for seed in range(count)
    ]


def test_a_real_unet(tiny_engines: Path, tmp_path: Path) -> None:
    """All kinds of pruning, twice: the file shrinks, is valid and reproducible to the byte."""
    feeds = unet_feeds(2)
    settings = PruneSettings(blocks=0.1, channels=0.25, heads=0.5)
    files = []
    for name in ("one", "two"):
        model = ir.load(tiny_engines / "denoiser.onnx")
        before = parameters(model.graph)
        whole = run(model, tmp_path, feeds[0])
        removed = prune(model, settings, feeds=feeds)
        sparsify(model, SparsitySettings(score="activation"), feeds=feeds)
        ir.save(model, tmp_path / f"{name}.onnx")
        files.append((tmp_path / f"{name}.onnx").read_bytes())
    assert files[0] == files[1]
    assert {part.kind for part in removed} == {"block", "channels", "heads"}
    assert before - parameters(model.graph) == sum(part.parameters for part in removed)
    assert len(files[0]) < (tiny_engines / "denoiser.onnx").stat().st_size * 0.92
    pruned = run(model, tmp_path, feeds[0])
    assert pruned.shape == whole.shape
    assert 0 < np.linalg.norm(pruned - whole) < np.linalg.norm(whole)


def test_matches_in_a_real_unet(tiny_engines: Path) -> None:
    graph = ir.load(tiny_engines / "denoiser.onnx").graph
    transformers = sum(layer.name.endswith("ff.net.2/MatMul") for layer in layers(graph))
    assert transformers == 4
    assert len(mlps(graph)) == transformers
    assert len(attentions(graph)) == 2 * transformers
    names = [branch.name for branch in branches(graph)]
    assert sum("transformer_blocks.0." in name for name in names) == 3 * transformers
    assert sum(name.endswith(("attentions.0", "attentions.1")) for name in names) == transformers
    assert "mid_block.resnets.0" in names
    assert len(set(names)) == len(names)
