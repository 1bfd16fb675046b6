"""Denoisers split at a skip connection: equal output from the feature of the same step."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tiers import tiered

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx_ir as ir

from latentforge.commands.describe import stage_lines
from latentforge.optimize.graph import layers, open_session
from latentforge.optimize.partition.graph_analysis import ancestors, infer_shapes, macs
from latentforge.optimize.partition.hoist import GraphPartition, hoist
from latentforge.optimize.passes import PASSES
from latentforge.optimize.passes.runner import optimize
from latentforge.optimize.search.cached_step import (
    CACHED_STEP,
    add_cached_step,
    count_levels,
    split,
)
from latentforge.optimize.shape_inference import Specs, specs_of
from latentforge.optimize.targets import TARGETS
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.kernels import DOMAIN, library
from latentforge.runtime.manifest import CACHED_FEATURE, FileEntry, Manifest

Array = NDArray[Any]
Feeds = Mapping[str, Array]

FAMILIES = {"bk-sdm": 1, "sd": 4, "decidiffusion-2": 4}
"""Number of skip connections by family, without those of a value with itself."""
LARGER = {"sd-2": 4, "lcm": 2, "sdxl": 4, "ssd-1b": 4, "sdxl-inpainting": 2, "decidiffusion-1": 4}
NAMES = [*tiered(FAMILIES), *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)]

Unet = Callable[[str], Path]


@pytest.fixture(scope="module")
def unet(tiny_denoiser: Unet) -> Unet:
    """Return a function from a family to an engine directory with its exported denoiser."""
    return tiny_denoiser


def whole(directory: Path) -> GraphPartition:
    component = Manifest.read(directory).components["denoiser"]
    return GraphPartition.whole(ir.load(directory / component.file), component)


def step(directory: Path) -> GraphPartition:
    """Return the part that runs at every step of a denoiser optimized for the CPU."""
    part = whole(directory)
    optimize(part.model, {name: PASSES[name] for name in TARGETS["cpu"].portable_passes})
    return hoist(part.model, part.inputs, part.outputs).step


def native(directory: Path) -> GraphPartition:
    """Return the same part with native operators, if they were compiled."""
    if library() is None:
        pytest.skip("the library of operators was not built")
    part = step(directory)
    optimize(part.model, {name: PASSES[name] for name in TARGETS["cpu"].post_partition_passes})
    assert any(node.domain == DOMAIN for node in part.model.graph)
    return part


FORMS: Mapping[str, Callable[[Path], GraphPartition]] = {
    "exported": whole,
    "step": step,
    "native": native,
}


def feeds_of(inputs: Specs, seed: int = 0) -> dict[str, Array]:
    """Return noise for every input except the timestep."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": 2, "latent_height": 8, "latent_width": 12}
    feeds = {
        name: rng.standard_normal(spec.resolve(sizes)).astype(spec.dtype)
        for name, spec in inputs.items()
    }
    if "timestep" in feeds:
        feeds["timestep"] = np.full_like(feeds["timestep"], 500)
    return feeds


def run(part: GraphPartition, feeds: Feeds) -> dict[str, Array]:
    session = open_session(part.model)
    names = [value.name for value in session.get_outputs()]
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    assert given.keys() == part.inputs.keys() and set(names) == part.outputs.keys()
    return dict(zip(names, session.run(names, given), strict=True))


# The same output


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_cached_and_full_graph_have_equal_output(unet: Unet, name: str, form: str) -> None:
    part = FORMS[form](unet(name))
    feeds = feeds_of(part.inputs)
    expected = run(part, feeds)["out_sample"]
    assert expected.std() > 0.01
    levels = count_levels(part.model)
    assert levels == {**FAMILIES, **LARGER}[name]
    sizes = {"batch": 1, "latent_height": 16, "latent_width": 16}
    costs = [macs(part.model, part.inputs, sizes)]
    for level in reversed(range(levels)):
        full, cached = split(part, level)
        made = run(full, feeds)
        np.testing.assert_array_equal(made["out_sample"], expected)
        feature = made[CACHED_FEATURE]
        assert feature.std() > 0 and feature.dtype == cached.inputs[CACHED_FEATURE].dtype
        found = run(cached, {**feeds, CACHED_FEATURE: feature})["out_sample"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        other = run(cached, {**feeds, CACHED_FEATURE: -feature})["out_sample"]
        assert np.abs(other - expected).max() > 1e-3 * np.abs(expected).max()
        costs.append(macs(cached.model, cached.inputs, sizes))
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)


@pytest.mark.parametrize("name", ["bk-sdm", "sd"])
def test_the_cached_graph_has_no_deep_layers(unet: Unet, name: str) -> None:
    part = step(unet(name))
    _, cached = split(part, 0)
    found = layers(cached.model.graph)
    modules = {layer.name.split(".")[0].split("/")[0] for layer in found}
    assert modules == {"conv_in", "conv_out", "up_blocks"}
    assert 0 < cached.layers < part.layers
    used = {str(value.name) for node in cached.model.graph for value in node.inputs if value}
    assert used >= cached.model.graph.initializers.keys() | cached.inputs.keys()


def test_the_part_is_not_changed(unet: Unet) -> None:
    part = whole(unet("sd"))
    content = ir.to_proto(part.model).SerializeToString(deterministic=True)
    split(part, 1)
    assert ir.to_proto(part.model).SerializeToString(deterministic=True) == content


# Small graphs

HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1, "latentforge" : 1]>\n'
SIGNATURE = "m (float[batch, 4, h, w] sample) => (float[batch, C, h, w] out_sample)"
LAST = "m (float[batch, h, w, 4] sample) => (float[batch, h, w, C] out_sample)"


def small(
    body: str, signature: str = SIGNATURE, channels: int = 8, weight: str = ""
) -> GraphPartition:
    """Return a graph; its weight, if any, is an input."""
    given = signature.replace("C", str(channels)).replace("sample)", f"sample{weight})", 1)
    model = ir.from_onnx_text(f"{HEAD}{given}\n{{{body}}}")
    graph = model.graph
    return GraphPartition(
        model=model, inputs=specs_of(graph.inputs), outputs=specs_of(graph.outputs), layers=0
    )


@pytest.mark.parametrize("order", ["deep, skip", "skip, deep"])
@pytest.mark.parametrize(("axis", "signature"), [(1, SIGNATURE), (3, LAST), (-1, LAST)])
def test_a_skip_connection_joins_a_value_and_its_ancestor(
    order: str, axis: int, signature: str
) -> None:
    part = small(
        f"""skip = Relu(sample)
        deep = Tanh(skip)
        out_sample = Concat<axis = {axis}>({order})""",
        signature,
    )
    sizes = {"batch": 2, "h": 3, "w": 5}
    sample = np.random.default_rng(0).standard_normal(part.inputs["sample"].resolve(sizes), "f4")
    full, cached = split(part, 0)
    assert [node.op_type for node in cached.model.graph] == ["Relu", "Concat"]
    made = run(full, {"sample": sample})
    np.testing.assert_allclose(made[CACHED_FEATURE], np.tanh(np.maximum(sample, 0)), rtol=1e-5)
    again = run(cached, {"sample": sample, CACHED_FEATURE: made[CACHED_FEATURE]})
    np.testing.assert_array_equal(again["out_sample"], made["out_sample"])


def test_a_transposed_skip_connection_is_found() -> None:
    part = small(
        """skip = Relu(sample)
        last = Transpose<perm = [0, 2, 3, 1]>(skip)
        deep = Tanh(skip)
        deep_last = Transpose<perm = [0, 2, 3, 1]>(deep)
        joined = Concat<axis = 3>(deep_last, last)
        out_sample = Transpose<perm = [0, 3, 1, 2]>(joined)"""
    )
    assert split(part, 0)[1].inputs[CACHED_FEATURE].shape == ("batch", "h", "w", 4)


@pytest.mark.parametrize(
    "body",
    [
        "a = Relu(sample) b = Tanh(sample) out_sample = Concat<axis = 1>(a, b)",
        "a = Relu(sample) out_sample = Concat<axis = 1>(a, a)",
        "a = Relu(sample) b = Identity(a) out_sample = Concat<axis = 1>(a, b)",
        "a = Relu(sample) b = Tanh(a) c = Concat<axis = 0>(a, b) out_sample = Concat<axis=1>(c, c)",
    ],
)
def test_other_concats_are_no_skip_connections(body: str) -> None:
    part = small(body)
    assert count_levels(part.model) == 0
    with pytest.raises(
        SettingsError, match="no skip connection of level 0: this denoiser has none"
    ):
        split(part, 0)


@pytest.mark.parametrize("level", [-1, 4])
def test_unknown_levels_are_refused(unet: Unet, level: int) -> None:
    with pytest.raises(SettingsError, match=f"of level {level}: .* has 0 to 3"):
        split(whole(unet("sd")), level)


def test_a_feature_of_unknown_shape_is_refused() -> None:
    part = small(
        """skip = Relu(sample)
        some = NonZero(skip)
        deep = Cast<to = 1>(some)
        out_sample = Concat<axis = 1>(deep, skip)"""
    )
    with pytest.raises(SettingsError, match="cannot split at deep: its shape"):
        split(part, 0)


def test_ancestors_of_a_value() -> None:
    graph = small("a = Relu(sample) b = Tanh(sample) c = Add(a, a) out_sample = Add(c, b)").model
    values = ir.convenience.create_value_mapping(graph.graph)
    assert {value.name for value in ancestors(values["c"])} == {"a", "c", "sample"}


# What it costs


def test_cost_of_convolutions_and_products() -> None:
    part = small(
        """c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(sample, k)
        shape = Constant<value_ints = [0, 0, -1]>()
        rows = Reshape(c, shape)
        turned = Transpose<perm = [0, 2, 1]>(rows)
        scores = MatMul(turned, rows)
        q = com.microsoft.QuickGelu(turned)
        attended = com.microsoft.MultiHeadAttention<num_heads = 2>(q, q, q)
        out_sample = Tanh(sample)""",
        channels=4,
        weight=", float[6, 4, 3, 3] k",
    )
    cost = macs(part.model, part.inputs, {"batch": 2, "h": 8, "w": 12})
    pixels = 4 * 6
    products = 2 * pixels * pixels * 6
    assert cost == 2 * pixels * 6 * 4 * 9 + products + 2 * products


def test_shapes_after_a_native_convolution() -> None:
    part = small(
        """big = latentforge.Conv<channels = 20, stride = 1, pads = [1, 1, 1, 1], upsample = 2>
            (sample, k)
        half = latentforge.Conv<channels = 20, stride = 2, pads = [1, 1, 1, 1]>(sample, k)
        out_sample = latentforge.GroupNorm<groups = 2>(big, half, half)""",
        LAST,
        20,
        ", float[2, 4, 3, 3, 16] k",
    )
    sizes = {"batch": 1, "h": 4, "w": 6}
    known = infer_shapes(part.model, part.inputs, sizes)
    assert known["big"] == known["out_sample"] == (1, 8, 12, 20)
    assert known["half"] == (1, 2, 3, 20)
    cost = macs(part.model, part.inputs, sizes)
    assert cost == (8 * 12 + 2 * 3) * 20 * 4 * 9


def test_cost_of_a_native_product() -> None:
    part = small(
        """shape = Constant<value_ints = [0, -1, 4]>()
        tokens = Reshape(sample, shape)
        q = latentforge.MatMul<channels = 20>(tokens, k)
        attended = latentforge.Attention<heads = 2, scale = 0.5>(q, q, q)
        out_sample = Relu(sample)""",
        LAST,
        4,
        ", float[2, 4, 1, 1, 16] k",
    )
    tokens = 4 * 6
    cost = macs(part.model, part.inputs, {"batch": 1, "h": 4, "w": 6})
    assert cost == tokens * 4 * 20 + 2 * tokens * tokens * 20


def test_cost_of_a_native_gated_product() -> None:
    part = small(
        """shape = Constant<value_ints = [0, -1, 4]>()
        tokens = Reshape(sample, shape)
        hidden = latentforge.MatMul<channels = 64, gated = 1>(tokens, k)
        back = latentforge.MatMul<channels = 4>(hidden, b)
        out_sample = Relu(sample)""",
        LAST,
        4,
        ", float[4, 4, 1, 1, 16] k, float[1, 32, 1, 1, 16] b",
    )
    sizes = {"batch": 1, "h": 4, "w": 6}
    assert infer_shapes(part.model, part.inputs, sizes)["hidden"] == (1, 24, 32)
    assert macs(part.model, part.inputs, sizes) == 24 * (4 * 64 + 32 * 4)


def test_cost_of_unknown_operators() -> None:
    part = small(
        "a = NonZero(sample) f = Cast<to = 1>(a) b = MatMul(f, f) out_sample = Relu(sample)"
    )
    with pytest.raises(SettingsError, match="multiply-accumulates cannot"):
        macs(part.model, part.inputs, {"batch": 1, "h": 8, "w": 8})


# Engine directories


def external(source: Path, target: Path) -> Path:
    """Store the denoiser's weights in an external data file."""
    target.mkdir()
    manifest = Manifest.read(source)
    ir.save(
        ir.load(source / "denoiser.onnx"),
        target / "denoiser.onnx",
        external_data="denoiser.onnx.data",
    )
    for tokenizer in manifest.tokenizers.values():
        (target / tokenizer.file).parent.mkdir()
        (target / tokenizer.file).write_bytes((source / tokenizer.file).read_bytes())
    main, data = (FileEntry.of(target / f"denoiser.onnx{end}", target) for end in ("", ".data"))
    unet = msgspec.structs.replace(
        manifest.components["denoiser"], sha256=main.sha256, bytes=main.bytes, data=(data,)
    )
    msgspec.structs.replace(manifest, components={"denoiser": unet}).write(target)
    return target


def loaded(directory: Path, name: str) -> Any:
    """Return the session of a component."""
    return Engine.load(name, Manifest.read(directory).components[name], directory, {}).session


@pytest.mark.parametrize("outside", [False, True])
def test_a_directory_with_cached_steps(unet: Unet, tmp_path: Path, outside: bool) -> None:
    source = external(unet("sd"), tmp_path / "source") if outside else unet("sd")
    target = tmp_path / "target"
    target.mkdir()
    written = add_cached_step(source, target, level=1)
    assert Manifest.read(target) == written
    full, cached = written.components["denoiser"], written.components[CACHED_STEP]
    assert full.outputs.keys() == {"out_sample", CACHED_FEATURE}
    assert cached.inputs.keys() == full.inputs.keys() | {CACHED_FEATURE}
    assert cached.inputs[CACHED_FEATURE] == full.outputs[CACHED_FEATURE]
    feeds = feeds_of(full.inputs)
    before = loaded(source, "denoiser").run(feeds)
    made = loaded(target, "denoiser").run(feeds)
    again = loaded(target, CACHED_STEP).run({**feeds, CACHED_FEATURE: made[CACHED_FEATURE]})
    np.testing.assert_array_equal(made["out_sample"], before["out_sample"])
    np.testing.assert_allclose(again["out_sample"], before["out_sample"], rtol=0, atol=1e-6)
    if outside:
        assert full.data == cached.data != ()
        assert os.path.samefile(source / "denoiser.onnx.data", target / "denoiser.onnx.data")
        assert cached.bytes < full.data[0].bytes / 10


def test_its_history_has_the_level_and_the_cost(unet: Unet, tmp_path: Path) -> None:
    written = add_cached_step(unet("sd"), tmp_path, level=0)
    stage = written.history[-1]
    assert (stage.name, stage.options) == ("cached-step", {"level": 0})
    part = whole(unet("sd"))
    sizes = {"batch": 1, "latent_height": 16, "latent_width": 16}  # those of the manifest's default
    assert written.defaults.height == 16 * written.latent.downscale
    cost = [macs(each.model, each.inputs, sizes) for each in split(part, 0)]
    assert stage.measured[CACHED_STEP]["macs_share"] == pytest.approx(cost[1] / cost[0], abs=1e-4)
    (line,) = stage_lines(stage)
    assert line.startswith(f"{CACHED_STEP}: macs_share {cost[1] / cost[0]:.3g}")
    assert 0.02 < stage.measured[CACHED_STEP]["macs_share"] < 0.3


def test_a_directory_is_split_once(unet: Unet, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    add_cached_step(unet("sd"), first)
    with pytest.raises(ManifestError, match="already has denoiser_cached: start from"):
        add_cached_step(first, second)


def test_files_are_copied_if_links_fail(
    unet: Unet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    source = external(unet("sd"), tmp_path / "source")
    (tmp_path / "target").mkdir()
    add_cached_step(source, tmp_path / "target")
    Manifest.read(tmp_path / "target")
    assert not os.path.samefile(
        source / "denoiser.onnx.data", tmp_path / "target" / "denoiser.onnx.data"
    )
