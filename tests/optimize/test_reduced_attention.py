"""Reduced attention: a quarter of the keys and values of large grids, and all of small ones."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx_ir as ir

from latentforge.optimize.graph import open_session
from latentforge.optimize.partition.hoist import GraphPartition
from latentforge.optimize.passes import PASSES
from latentforge.optimize.passes.runner import optimize
from latentforge.optimize.search.reduced_attention import (
    REDUCED,
    add_reduced_attention,
    grid_tokens,
    reduce_attention,
)
from latentforge.optimize.shape_inference import specs_of
from latentforge.optimize.stage.component import save_part
from latentforge.optimize.targets import TARGETS
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.kernels import library
from latentforge.runtime.manifest import Manifest

Array = NDArray[np.float32]

HEADS, WIDTH, SEEN = 2, 4, 5
TEXT = f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
m (float[batch, {WIDTH}, latent_height, latent_width] sample, float[1] timestep,
   float[batch, {SEEN}, {WIDTH}] encoder_hidden_states)
  => (float[batch, {WIDTH}, latent_height, latent_width] out_sample)
<float[batch, latent_height, latent_width, {WIDTH}] image, float[batch, tokens, {WIDTH}] tokens,
 float[batch, tokens, {WIDTH}] unbiased, float[batch, tokens, {WIDTH}] k,
 float[batch, tokens, {WIDTH}] v>
{{
  image = Transpose<perm = [0, 2, 3, 1]>(sample)
  row = Constant<value_ints = [0, -1, {WIDTH}]>()
  tokens = Reshape(image, row)
  q = MatMul(tokens, wq)
  unbiased = MatMul(tokens, wk)
  k = Add(unbiased, bias)
  v = MatMul(tokens, wv)
  attended = com.microsoft.MultiHeadAttention<num_heads = {HEADS}>(q, k, v)
  q2 = MatMul(attended, wq)
  k2 = MatMul(encoder_hidden_states, wk)
  v2 = MatMul(encoder_hidden_states, wv)
  crossed = com.microsoft.MultiHeadAttention<num_heads = {HEADS}>(q2, k2, v2)
  shape = Shape(image)
  grid = Reshape(crossed, shape)
  turned = Transpose<perm = [0, 3, 1, 2]>(grid)
  scaled = Mul(turned, timestep)
  out_sample = Add(scaled, sample)
}}"""
WEIGHTS = ("wq", "wk", "wv", "bias")


def array(name: str) -> Array:
    shape = (WIDTH,) if name == "bias" else (WIDTH, WIDTH)
    return np.random.default_rng(WEIGHTS.index(name)).standard_normal(shape, np.float32)


def attention() -> Any:
    """Return a fused self-attention over an image and a cross-attention, with weights."""
    inputs = "".join(f", float[{', '.join(map(str, array(w).shape))}] {w}" for w in WEIGHTS)
    text = TEXT.replace("encoder_hidden_states)\n", f"encoder_hidden_states{inputs})\n", 1)
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[-len(WEIGHTS) :]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array(value.name), name=value.name)
        model.graph.register_initializer(value)
    return model


def feeds(height: int, width: int) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    return {
        "sample": rng.standard_normal((2, WIDTH, height, width), np.float32),
        "timestep": np.ones(1, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, SEEN, WIDTH), np.float32),
    }


def run(model: Any, given: dict[str, Array]) -> Array:
    (output,) = open_session(model).run(["out_sample"], given)
    return np.asarray(output)


def attend(queries: Array, keys: Array, values: Array) -> Array:
    """Return softmax(q k^T / sqrt(d)) v by heads, for (batch, tokens, channels)."""

    def heads(x: Array) -> Array:
        return x.reshape(len(x), -1, HEADS, WIDTH // HEADS).transpose(0, 2, 1, 3)

    q, k, v = heads(queries), heads(keys), heads(values)
    scores = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(WIDTH / HEADS))
    weights = scores / scores.sum(-1, keepdims=True)
    return (weights @ v).transpose(0, 2, 1, 3).reshape(queries.shape)


def expected(given: dict[str, Array], step: int) -> Array:
    """Compute the graph with keys and values of every ``step``-th row and column."""
    wq, wk, wv, bias = map(array, WEIGHTS)
    image = given["sample"].transpose(0, 2, 3, 1)
    tokens = image.reshape(len(image), -1, WIDTH)
    fewer = image[:, ::step, ::step].reshape(len(image), -1, WIDTH)
    attended = attend(tokens @ wq, fewer @ wk + bias, fewer @ wv)
    prompt = given["encoder_hidden_states"]
    crossed = attend(attended @ wq, prompt @ wk, prompt @ wv)
    return crossed.reshape(image.shape).transpose(0, 3, 1, 2) + given["sample"]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (8, 8)])
def test_keys_and_values_of_every_second_row_and_column(height: int, width: int) -> None:
    model = attention()
    assert reduce_attention(model, min_tokens=height * width) == 1
    given = feeds(height, width)
    np.testing.assert_allclose(run(model, given), expected(given, 2), atol=1e-5)
    assert np.abs(expected(given, 2) - expected(given, 1)).max() > 1e-2


def test_small_grids_keep_all_tokens() -> None:
    model = attention()
    reduce_attention(model, min_tokens=25)
    given = feeds(4, 6)
    np.testing.assert_allclose(run(model, given), expected(given, 1), atol=1e-5)
    np.testing.assert_array_equal(run(model, given), run(attention(), given))
    larger = feeds(5, 5)
    np.testing.assert_allclose(run(model, larger), expected(larger, 2), atol=1e-5)


def test_a_graph_without_fused_self_attention_is_not_changed() -> None:
    model = attention()
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    told = next(value for value in model.graph.inputs if value.name == "encoder_hidden_states")
    for projection in ("k", "v"):  # now both attend to the prompt
        value = next(v for v in node.inputs if v.name == projection)
        product = value.producer() if projection == "v" else value.producer().inputs[0].producer()
        product.replace_input_with(0, told)
    assert reduce_attention(model, min_tokens=1) == 0


def test_the_tokens_of_each_grid() -> None:
    graph = attention()
    inputs, outputs = (specs_of(side) for side in (graph.graph.inputs, graph.graph.outputs))
    part = GraphPartition(model=graph, inputs=inputs, outputs=outputs, layers=0)
    assert grid_tokens(part, {"batch": 1, "latent_height": 6, "latent_width": 10}) == (60,)


# Engine directories


@pytest.fixture(scope="module", params=["portable", "native"])
def optimized(
    request: pytest.FixtureRequest, tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Optimize the tiny engines' denoiser for the CPU, with and without native operators."""
    cpu, native = TARGETS["cpu"], request.param == "native"
    if native and library() is None:
        pytest.skip("the library of operators was not built")
    target = tmp_path_factory.mktemp("reduce") / "optimized"
    shutil.copytree(tiny_engines, target)
    manifest = Manifest.read(target)
    unet = manifest.components["denoiser"]
    model = ir.load(target / unet.file)
    for passes in (cpu.portable_passes, cpu.post_partition_passes if native else ()):
        optimize(model, {name: PASSES[name] for name in passes})
    written = save_part("denoiser", GraphPartition.whole(model, unet), unet, target)
    components = {**manifest.components, "denoiser": written}
    msgspec.structs.replace(manifest, components=components).write(target)
    return target


def out_sample(directory: Path, name: str, side: int) -> Array:
    component = Manifest.read(directory).components[name]
    rng = np.random.default_rng(0)
    sizes = {"batch": 1, "latent_height": side, "latent_width": side}
    given = {
        key: rng.standard_normal(spec.resolve(sizes)).astype(spec.dtype)
        for key, spec in component.inputs.items()
    }
    session = Engine.load(name, component, directory, {}).session
    return np.asarray(session.run(given)["out_sample"])


def test_a_directory_with_reduced_attention(optimized: Path, tmp_path: Path) -> None:
    written = add_reduced_attention(optimized, tmp_path, min_tokens=256)
    assert Manifest.read(tmp_path) == written
    unet, reduced = written.components["denoiser"], written.components[REDUCED]
    assert (reduced.inputs, reduced.outputs) == (unet.inputs, unet.outputs)
    assert unet.sha256 == Manifest.read(optimized).components["denoiser"].sha256
    stage = written.history[-1]
    assert (stage.name, stage.options) == ("reduced-attention", {"min_tokens": 256})
    assert stage.measured[REDUCED]["attentions"] == 4  # one down, one in the middle, two up
    exact, small = (out_sample(tmp_path, name, 8) for name in ("denoiser", REDUCED))
    np.testing.assert_array_equal(small, exact)
    exact, large = (out_sample(tmp_path, name, 16) for name in ("denoiser", REDUCED))
    assert 1e-5 < np.abs(large - exact).max() / np.abs(exact).max() < 0.3


def test_the_component_is_added_once(optimized: Path, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    add_reduced_attention(optimized, tmp_path / "first")
    with pytest.raises(ManifestError, match="already has denoiser_reduced: start from"):
        add_reduced_attention(tmp_path / "first", tmp_path)


def test_engines_that_were_not_optimized_are_refused(tiny_engines: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no fused self-attention .* optimize it for the cpu"):
        add_reduced_attention(tiny_engines, tmp_path)
