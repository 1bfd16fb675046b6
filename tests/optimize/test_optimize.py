"""The optimize stage on real engines: results, history, and errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

import latentforge
from latentforge.commands.arguments import TARGETS as NAMED
from latentforge.optimize.stage.job import plan
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.stage.stage import optimize
from latentforge.optimize.targets import TARGETS
from latentforge.runtime.compile.verify import verify
from latentforge.runtime.errors import BackendError, GateError, ManifestError, SettingsError
from latentforge.runtime.image import psnr
from latentforge.runtime.kernels import instruction_sets
from latentforge.runtime.manifest import FileEntry, Manifest

Copy = Callable[[Path], Path]

SETTINGS = {"steps": 2, "sampler": "ddim"}


def quick(**options: Any) -> OptimizeRequest:
    """Return a request of two steps and one image, without timing."""
    return OptimizeRequest(**{"settings": SETTINGS, "repeats": 0, "gate": ("images=1",), **options})


def test_the_command_line_names_every_target() -> None:
    assert set(NAMED) == set(TARGETS)


@pytest.fixture(scope="module")
def fused(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny engines by the recipe fp32, timed."""
    target = tmp_path_factory.mktemp("fused") / "fp32"
    optimize(tiny_engines, target, quick(recipe="fp32", repeats=6))
    return target


@pytest.fixture(scope="module")
def int8(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny engines by the recipe int8. Copy them before changing them."""
    target = tmp_path_factory.mktemp("quantized") / "int8"
    optimize(tiny_engines, target, quick(recipe="int8"))
    return target


def test_result_is_sound_and_makes_the_same_image(fused: Path, tiny_engines: Path) -> None:
    assert len(list(verify(fused))) == 8
    latents = []
    for directory in (tiny_engines, fused):
        with latentforge.load(directory) as pipe:
            latents.append(pipe("red apple", seed=3, steps=4).latents)
    assert psnr(*latents) >= 100


def test_only_engines_are_left(fused: Path) -> None:
    names = {path.name for path in fused.iterdir()}
    parts = (
        "text_encoder",
        "denoiser_prompt",
        "denoiser_time",
        "denoiser",
        "vae_decoder",
        "vae_encoder",
    )
    assert names == {*(f"{part}.onnx" for part in parts), "tokenizer", "manifest.json"}


def test_history_has_passes_and_figures(fused: Path) -> None:
    first, second = Manifest.read(fused).history
    assert (first.name, second.name) == ("export", "optimize")
    assert second.options["recipe"] == "fp32" and second.options["target"] == "cpu"
    assert second.passes["denoiser/fuse-attention"] == 8
    unet, image = second.measured["denoiser"], second.measured["image"]
    assert unet["nodes_after"] < unet["nodes_before"]
    assert unet["max_relative_error"] < 1e-4
    assert image["psnr"] > 60 and image["images"] == 1
    assert 0 < image["speedup_low"] <= image["speedup"] <= image["speedup_high"]
    assert image["speedup_level"] == pytest.approx(0.9688)
    assert min(image[f"{what}_after"] for what in ("seconds", "memory")) > 0


def test_optimized_engines_are_not_optimized_again(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="already optimized, with recipe fp32"):
        optimize(fused, tmp_path / "again", quick())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "int8", "int8-weights", "small", "sparse"])
def test_recipe(recipe: str, tiny_engines: Path, tmp_path: Path) -> None:
    """Weights are random, so the image only has to vary, and the files have to shrink."""
    path = tmp_path / "out"
    manifest = optimize(tiny_engines, path, quick(recipe=recipe, gate=("psnr=5", "images=1")))
    assert Manifest.read(path) == manifest
    with latentforge.load(path) as pipe:
        assert np.ptp(np.asarray(pipe("red apple", **SETTINGS, seed=0).images[0])) > 0
    sizes = [
        sum(m[key] for m in manifest.history[-1].measured.values() if key in m)
        for key in ("bytes_before", "bytes_after")
    ]
    assert sizes[1] < 0.75 * sizes[0]


def test_another_schedule_warns_about_calibration(
    int8: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with latentforge.load(int8) as pipe:
        pipe("red apple", **SETTINGS)
        assert not caplog.records
        pipe("red apple", steps=3, sampler="euler")
    assert "calibrated for ddim with 2 steps, and this request is euler with 3" in caplog.text
    assert not any("calibrated" in line for line in verify(int8))


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_same_input_same_bytes(
    recipe: str, fused: Path, int8: Path, tiny_engines: Path, tmp_path: Path, copy: Copy
) -> None:
    """And the source is left as it was."""
    source = copy(tiny_engines)
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    again = optimize(source, tmp_path / "again", quick(recipe=recipe))
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    first = Manifest.read({"fp32": fused, "int8": int8}[recipe])
    for name, component in first.components.items():
        assert again.components[name].sha256 == component.sha256, name
    assert again.components.keys() == first.components.keys()


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"cpu"}))
def test_targets(target: str, tiny_engines: Path, tmp_path: Path) -> None:
    """A target that cannot run here is judged by its portable variant, and refused at load."""
    path = tmp_path / "out"
    manifest = optimize(tiny_engines, path, quick(recipe="fp16", target=target))
    domains = {
        node.domain
        for component in manifest.components.values()
        for node in ir.load(path / component.file).graph
    }
    assert domains == ({"", "com.microsoft"} if target == "cuda" else {""})
    assert manifest.history[-1].measured["image"]["psnr"] > 30
    assert not (path / "portable").exists()
    if target == "cuda":
        with pytest.raises(BackendError, match="cuda"):
            latentforge.load(path)
    else:
        assert latentforge.load(path)("a", **SETTINGS).images


def test_a_failed_gate_publishes_nothing(tiny_engines: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"psnr is .* has to be at least 190.*kept as"):
        optimize(tiny_engines, tmp_path / "out", quick(recipe="int8", gate=("psnr=190",)))
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    rejected = Manifest.read(tmp_path / "out.rejected")
    assert rejected.history[-1].measured["image"]["psnr"] < 190


def test_nan_is_a_failed_gate(tiny_engines: Path, tmp_path: Path, copy: Copy) -> None:
    """A weight beyond half's range becomes infinite where the target computes in half."""
    broken = copy(tiny_engines)
    _edit(broken, "vae_decoder", _overflow)
    with pytest.raises(GateError, match="NaN or infinity"):
        optimize(broken, tmp_path / "out", quick(recipe="fp16", target="tensorrt"))
    assert not (tmp_path / "out").exists()


def _overflow(model: ir.Model) -> None:
    """Make the first activations as large as float32 takes easily and half does not."""
    first = next(node for node in model.graph if node.op_type == "Conv")
    weight = first.inputs[1]
    assert weight is not None and weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(3e4))


def _edit(directory: Path, name: str, change: Callable[[ir.Model], None]) -> None:
    """Change a component's graph, and update the manifest."""
    model = ir.load(directory / f"{name}.onnx")
    change(model)
    ir.save(model, directory / "changed")
    _replace(directory, name, (directory / "changed").read_bytes())


@pytest.mark.thorough
def test_auto_records_candidates_and_choice(small_engines: Path, tmp_path: Path) -> None:
    manifest = optimize(small_engines, tmp_path / "out", quick(recipe="auto", repeats=1))
    options = manifest.history[-1].options
    sets = instruction_sets()
    faster = {"bf16"} if sets is not None and sets.multiplies_bf16 else set[str]()
    assert set(options["candidates"]) == {"fp32", "fp16", "int8"} | faster
    assert options["chosen"] in options["candidates"]
    assert all("speedup" in each or "failures" in each for each in options["candidates"].values())
    assert not list((tmp_path / "out").glob("candidate-*"))


@pytest.mark.thorough
def test_the_most_sensitive_layers_stay_in_float(small_engines: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "scan.toml"
    recipe.write_text(
        'summary = "s"\n[precision]\ndenoiser = "int8"\n[sensitivity]\nfloat_fraction = 0.1\n'
    )
    manifest = optimize(small_engines, tmp_path / "out", quick(recipe=str(recipe)))
    stage = manifest.history[-1]
    layers = stage.options["layers"]
    kept = [layer for layer in layers if layer["kept_float"]]
    assert len(kept) == round(0.1 * len(layers)) > 0
    # what is kept costs more for what it saves than anything that is not
    worth = {layer["kept_float"]: [] for layer in layers}
    for layer in layers:
        worth[layer["kept_float"]].append(layer["error"] / layer["bytes"])
    assert min(worth[True]) >= max(worth[False])
    assert stage.passes["denoiser/int8-kept"] >= len(kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": "int9"}, "did you mean 'int8'"),
        ({"target": "cude"}, "did you mean 'cuda'"),
        ({"gate": ("pnsr=3",)}, "psnr"),
        ({"repeats": -1}, "repeats"),
        ({"calibration_prompts": 0}, "prompts"),
        ({"recipe": "int8", "target": "cuda"}, "tensorrt"),
        ({"recipe": "auto", "repeats": 0}, "measuring"),
        ({"settings": {"steps": 0}}, "steps"),
        ({"settings": {"sampler": "eular"}}, "eular"),
    ],
)
def test_bad_requests(
    tiny_engines: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        optimize(tiny_engines, tmp_path / "out", quick(**change))
    assert list(tmp_path.iterdir()) == []


def test_calibration_uses_other_prompts_than_the_gate(tiny_engines: Path) -> None:
    request = quick(recipe="int8", prompts=("a", "b", "c"), calibration_prompts=2)
    assert plan(tiny_engines, request).prompt_sets == (("a",), ("b", "c"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("garbage", b"\x08\x07nothing of the kind", "denoiser"),
        ("another", None, "the manifest lists the inputs"),
    ],
)
def test_foreign_graphs_are_refused(
    tiny_engines: Path, tmp_path: Path, copy: Copy, name: str, content: bytes | None, words: str
) -> None:
    foreign = copy(tiny_engines)
    if content is None:
        content = (foreign / "vae_decoder.onnx").read_bytes()
    _replace(foreign, "denoiser", content)
    with pytest.raises((ManifestError, BackendError), match=words):
        optimize(foreign, tmp_path / "out", quick())
    assert not (tmp_path / "out").exists()


def _replace(directory: Path, name: str, content: bytes) -> None:
    manifest = Manifest.read(directory)
    path = directory / f"{name}.onnx"
    path.write_bytes(content)
    entry = FileEntry.of(path, directory)
    component = msgspec.structs.replace(
        manifest.components[name], sha256=entry.sha256, bytes=entry.bytes
    )
    components = {**manifest.components, name: component}
    msgspec.structs.replace(manifest, components=components).write(directory)


def test_int8_graphs_are_not_quantized_again(int8: Path, tmp_path: Path, copy: Copy) -> None:
    """Not even without an entry in the history, as with graphs of another tool."""
    path = copy(int8)
    manifest = Manifest.read(path)
    msgspec.structs.replace(manifest, history=manifest.history[:1]).write(path)
    with pytest.raises(SettingsError, match="quantized"):
        optimize(path, tmp_path / "again", quick(recipe="int8"))
    assert not (tmp_path / "again").exists()


def test_missing_components_are_named(tiny_engines: Path, tmp_path: Path, copy: Copy) -> None:
    part = copy(tiny_engines)
    manifest = Manifest.read(part)
    components = {n: c for n, c in manifest.components.items() if n != "denoiser"}
    msgspec.structs.replace(manifest, components=components).write(part)
    with pytest.raises(ManifestError, match="no denoiser, without which no images"):
        optimize(part, tmp_path / "out", quick())
