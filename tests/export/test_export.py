"""Export writes engines that reproduce torch's outputs, completely or not at all."""

import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

import torch
from diffusers import UNet2DConditionModel
from logged import logged
from onnxscript import optimizer

from latentforge.export import parity
from latentforge.export.checkpoint import open_checkpoint
from latentforge.export.families import ComponentPlan, family_of
from latentforge.export.families.parts import unet_multiple
from latentforge.export.onnx import Dimensions, quick_slice_rule
from latentforge.export.reference.eager import EagerPipeline
from latentforge.export.stage import ExportRequest, export
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import (
    CheckpointError,
    GateError,
    LatentforgeError,
    SettingsError,
    ShapeError,
    TargetError,
)
from latentforge.runtime.files import hash_file
from latentforge.runtime.image import psnr, relative_error
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.tensor import TensorSpec

Copy = Callable[[Path], Path]

COMPONENTS = ["text_encoder", "denoiser", "vae_decoder", "vae_encoder"]
FOLDERS = dict(zip(COMPONENTS, ["text_encoder", "unet", "vae", "vae"], strict=True))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def plans(checkpoint: Path) -> dict[str, ComponentPlan]:
    opened = open_checkpoint(str(checkpoint))
    return {plan.name: plan for plan in family_of(opened).plan(opened).components}


# Memory


@pytest.mark.parametrize(("limit", "freed"), [(0, True), (1 << 40, False)])
def test_weights_of_large_modules_are_freed_at_once(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, limit: int, freed: bool
) -> None:
    """Those of a module in a reference cycle too, also where an export has emptied them."""
    plan = plans(tiny_checkpoint)["text_encoder"]
    monkeypatch.setattr(parity, "_COLLECTED", limit)
    modules = parity.LazyModules(open_checkpoint(str(tiny_checkpoint)))
    module: Any = modules.get(plan)
    module.cycle = [module]
    for weight in module.parameters():
        weight.data = torch.empty(0)
    kept = weakref.ref(module)
    del module, weight
    gc.disable()
    try:
        modules.free()
        assert (kept() is None) == freed
    finally:
        gc.enable()


def test_a_module_is_large_by_its_weights(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its tensors count, and one of the limit's size is collected."""
    plan = plans(tiny_checkpoint)["text_encoder"]
    modules = parity.LazyModules(open_checkpoint(str(tiny_checkpoint)))
    size = sum(tensor.nbytes for tensor in modules.get(plan).state_dict().values())
    calls: list[int] = []
    monkeypatch.setattr(parity.gc, "collect", lambda: calls.append(1) or 0)
    for limit in (size + 1, size):
        monkeypatch.setattr(parity, "_COLLECTED", limit)
        modules.get(plan)
        modules.free()
        modules.free()  # nothing is left to collect
    assert calls == [1]


# Contents of the directory


def test_the_manifest(tiny_engines: Path, tiny_checkpoint: Path) -> None:
    manifest = Manifest.read(tiny_engines)
    assert manifest.name == "tiny" and manifest.family == "stable_diffusion"
    assert list(manifest.components) == COMPONENTS
    assert manifest.prediction == "epsilon" and manifest.defaults.sampler == "pndm"
    assert manifest.latent.downscale == 2 and manifest.latent.multiple == 1
    assert (manifest.defaults.height, manifest.defaults.width) == (32, 32)
    assert manifest.source.checkpoint == str(tiny_checkpoint)
    for part in manifest.components.values():
        assert part.backend == "onnxruntime" and part.precision == "fp32"
    expected = {"manifest.json", "tokenizer", *(f"{name}.onnx" for name in COMPONENTS)}
    assert set(names(tiny_engines)) == expected
    assert names(tiny_engines.parent) == ["tiny"]


def test_hashes_are_those_of_the_checkpoint(tiny_engines: Path, tiny_checkpoint: Path) -> None:
    sha256 = Manifest.read(tiny_engines).source.sha256
    assert sha256 == {
        folder: hash_file(next((tiny_checkpoint / folder).glob("*.safetensors")))
        for folder in sorted(set(FOLDERS.values()))
    }


def test_quality_is_measured(tiny_engines: Path) -> None:
    quality = Manifest.read(tiny_engines).quality
    assert set(quality) == {*COMPONENTS, "image"}
    for name in COMPONENTS:
        assert 0 < quality[name]["max_relative_error"] < 1e-4 and quality[name]["psnr"] > 80
    assert quality["image"]["psnr"] > 60 and quality["image"]["latents_psnr"] > 60


def test_history_records_options_and_tools(tiny_engines: Path) -> None:
    (stage,) = Manifest.read(tiny_engines).history
    assert stage.name == "export" and stage.seconds > 0
    reference = stage.options["reference"]
    assert stage.options == {"opset": 20, "components": COMPONENTS, "reference": reference}
    assert (reference["scheduler"], reference["own_scheduler"]) == ("PNDMScheduler", True)
    assert stage.measured == {"image": Manifest.read(tiny_engines).quality["image"]}
    assert {"latentforge", "torch", "diffusers", "onnxruntime"} <= set(stage.tools)
    assert stage.tools["torch"] == torch.__version__


def test_files_contain_no_local_paths(tiny_engines: Path, tiny_checkpoint: Path) -> None:
    packages = Path(torch.__file__).parents[1]
    places = {tiny_engines.parent, tiny_checkpoint.parent, packages, Path.cwd(), Path.home()}
    forbidden = [str(place).encode() for place in places if place != Path("/")]
    forbidden += [b"site-packages", b".py", b"line "]
    manifest = json.loads((tiny_engines / "manifest.json").read_text())
    del manifest["source"]["checkpoint"]  # as the user typed it: the one exception
    contents = {path.name: path.read_bytes() for path in tiny_engines.rglob("*.onnx")}
    contents["manifest.json"] = json.dumps(manifest).encode()
    assert len(contents) == 5
    for name, content in contents.items():
        assert [text for text in forbidden if text in content] == [], name


def test_graphs_match_the_manifest(tiny_engines: Path) -> None:
    import onnx

    for name, part in Manifest.read(tiny_engines).components.items():
        model = onnx.load(tiny_engines / part.file)
        onnx.checker.check_model(model, full_check=True)
        for values, specs in ((model.graph.input, part.inputs), (model.graph.output, part.outputs)):
            assert [value.name for value in values] == list(specs)
            for value in values:
                spec = specs[value.name]
                dims = value.type.tensor_type.shape.dim
                found = [dim.dim_value or dim.dim_param for dim in dims]
                assert len(found) == len(spec.shape)
                for size, want in zip(found, spec.shape, strict=True):
                    assert isinstance(size, str) == isinstance(want, str), (name, value.name)
        assert {opset.domain: opset.version for opset in model.opset_import}[""] == 20


# Free dimensions are free


def feeds(specs: Mapping[str, TensorSpec], sizes: dict[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, spec in specs.items():
        shape = spec.resolve(sizes)
        random_ids = rng.integers(0, 1000, shape)
        arrays[name] = (
            random_ids if spec.dtype == "int64" else rng.normal(size=shape).astype(spec.dtype)
        )
    if "timestep" in arrays:
        arrays["timestep"][:] = 321
    return arrays


SIZES = [(1, 8, 8), (3, 16, 16), (2, 6, 20), (5, 34, 10)]


@pytest.mark.parametrize("name", COMPONENTS)
def test_other_sizes_match_torch(name: str, tiny_engines: Path, tiny_checkpoint: Path) -> None:
    check_other_sizes(name, tiny_engines, tiny_checkpoint)


@pytest.mark.thorough
def test_other_sizes_of_a_flexible_unet_match_torch(
    tiny: Callable[[str], Path], tiny_denoiser: Callable[[str], Path]
) -> None:
    family = "decidiffusion-2"
    check_other_sizes("denoiser", tiny_denoiser(family), tiny(family))


def check_other_sizes(name: str, engines: Path, checkpoint: Path) -> None:
    part = Manifest.read(engines, hashes=False).components[name]
    engine = Engine.load(name, part, engines, {"threads": 1})
    plan = plans(checkpoint)[name]
    module = plan.load(open_checkpoint(str(checkpoint)))
    for batch, height, width in SIZES:
        sizes = {
            "batch": batch,
            "latent_height": height,
            "latent_width": width,
            "height": 2 * height,
            "width": 2 * width,
        }
        inputs = feeds(part.inputs, sizes)
        with torch.inference_mode():
            value = module(*(torch.from_numpy(inputs[key]) for key in plan.inputs))
        expected = (value[0] if isinstance(value, tuple) else value).numpy()
        (output,) = engine.session.run(inputs).values()
        (spec,) = part.outputs.values()
        assert output.shape == spec.resolve(sizes)
        assert relative_error(expected, output) < 1e-4


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_images_match_diffusers(
    tiny_engines: Path, tiny_checkpoint: Path, size: tuple[int, int]
) -> None:
    with load(tiny_engines, threads=1) as pipe:
        settings = pipe.settings(
            ["a red fox", "moon"],
            negative_prompt="blue",
            images_per_prompt=2,
            steps=4,
            seed=11,
            height=size[0],
            width=size[1],
        )
        result = pipe.run(settings)
    reference = EagerPipeline(open_checkpoint(str(tiny_checkpoint)))(settings)
    assert len(result.images) == 4
    assert result.images[0].size == reference.images[0].size == size[::-1]
    assert psnr(reference.latents, result.latents) > 80
    for image, expected in zip(result.images, reference.images, strict=True):
        assert psnr(np.asarray(expected), np.asarray(image), peak=255) > 50


# Fixed dimensions are fixed


def weights_in_memory() -> int:
    """Return the number of values of torch's weights that are in memory."""
    parameters = (each for each in gc.get_objects() if type(each) is torch.nn.Parameter)
    return sum(each.numel() for each in parameters)


@pytest.fixture(scope="module")
def fixed(
    tiny_checkpoint: Path, tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny engines with a UNet of batch 1, for images of 24 x 40."""
    directory = tmp_path_factory.mktemp("fixed")
    dimensions = Dimensions(batch=1, height=24, width=40)
    before = weights_in_memory()
    manifest = export(
        str(tiny_checkpoint),
        directory / "unet",
        ExportRequest(components=("denoiser",), dimensions=dimensions),
    )
    assert manifest.history[0].options["height"] == 24
    assert weights_in_memory() <= before  # a build goes on in this process
    shutil.copytree(tiny_engines, directory / "all")
    shutil.copy(directory / "unet" / "denoiser.onnx", directory / "all")
    content = json.loads((tiny_engines / "manifest.json").read_text())
    part = json.loads((directory / "unet" / "manifest.json").read_text())
    content["components"]["denoiser"] = part["components"]["denoiser"]
    content["defaults"] = part["defaults"]
    (directory / "all" / "manifest.json").write_text(json.dumps(content))
    return directory / "all"


def test_fixed_sizes_are_in_graph_and_manifest(fixed: Path) -> None:
    import onnx

    part = Manifest.read(fixed).components["denoiser"]
    assert part.inputs["sample"].shape == part.outputs["out_sample"].shape == (1, 4, 12, 20)
    graph = onnx.load(fixed / "denoiser.onnx").graph
    for value in (*graph.input, *graph.output):
        assert all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim), value.name


def test_fixed_sizes_refuse_others(fixed: Path) -> None:
    with load(fixed, threads=1) as pipe:
        with pytest.raises(ShapeError, match="make images of 24x40 pixels .* not 32x40"):
            pipe("a fox", height=32)
        with pytest.raises(ShapeError, match="make images of 24x40 pixels .* not 24x24"):
            pipe("a fox", width=24)
        sample = np.zeros((2, 4, 12, 20), np.float32)
        text = np.zeros((2, 24, 32), np.float32)
        given = {
            "sample": sample,
            "timestep": np.ones(1, np.float32),
            "encoder_hidden_states": text,
        }
        with pytest.raises(ShapeError, match="sample: engine takes"):
            pipe.engines["denoiser"].session.run(given)


def test_a_fixed_batch_serves_guided_requests_of_many(fixed: Path, tiny_engines: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "seed": 3, "height": 24, "width": 40}
    with load(fixed, threads=1) as bound, load(tiny_engines, threads=1) as free:
        for prompts in (["a fox"], ["a fox", "moon", "star"]):
            ours, theirs = bound(prompts, **settings), free(prompts, **settings)
            assert psnr(theirs.latents, ours.latents) > 80


SIDES = [(16, 16), (9, 8), (7, 13), (1, 1), (2, 31)]


def test_a_unet_of_any_sides(tiny_checkpoint: Path, tiny_engines: Path) -> None:
    """As diffusers' own, whose skip connections say how far it upsamples."""
    unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet").eval()
    engine = load(tiny_engines, threads=1).engines["denoiser"]
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(2, 24, 32, generator=generator)
    for height, width in SIDES:
        sample = torch.randn(2, 4, height, width, generator=generator)
        with torch.no_grad():
            expected = unet(sample, torch.tensor(5.0), context).sample.numpy()
        rows = {"sample": sample.numpy(), "encoder_hidden_states": context.numpy()}
        output = engine.run(rows, {"timestep": np.float32([5])})["out_sample"]
        assert relative_error(expected, output) < 1e-4


@pytest.mark.parametrize(
    ("changes", "multiple"),
    [
        ({}, 1),
        ({"downsample_padding": 0}, 4),
        ({"down_block_types": ["ResnetDownsampleBlock2D"] * 3}, 4),
        ({"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3}, 4),
    ],
)
def test_other_unets_keep_their_multiples(changes: dict[str, Any], multiple: int) -> None:
    """Those of blocks that double, or that downsample in another way."""
    config = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [32, 64, 64],
    }
    assert unet_multiple({**config, **changes}) == multiple


# Refusals before any work


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"components": ("unett",)},
            SettingsError,
            "no component 'unett'; .* text_encoder, denoiser",
        ),
        ({"dimensions": {"height": 31}}, ShapeError, "must be multiples of 2, not 31"),
        (
            {"dimensions": {"batch": 0}},
            SettingsError,
            "batch must be an integer from 1 to 16384, not 0",
        ),
        (
            {"dimensions": {"width": 2.5}},
            SettingsError,
            "width must be an integer from 1 to 16384, not 2.5",
        ),
    ],
)
def test_refuses_options(
    tiny_checkpoint: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[LatentforgeError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        if "dimensions" in options:
            options = {"dimensions": Dimensions(**options["dimensions"])}
        export(str(tiny_checkpoint), tmp_path / "new", ExportRequest(**options))
    assert names(tmp_path) == []


@pytest.mark.parametrize("folder", ["unet", "vae", "text_encoder"])
def test_refuses_damage_anywhere_before_any_work(
    tiny_checkpoint: Path, copy: Copy, tmp_path: Path, folder: str
) -> None:
    checkpoint = copy(tiny_checkpoint)
    weights = next((checkpoint / folder).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"{folder}.*truncated"):
        export(str(checkpoint), tmp_path / "new", ExportRequest(components=("text_encoder",)))
    assert time.process_time() - start < 2
    assert names(tmp_path) == [checkpoint.name]


def test_refuses_an_existing_target(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary").touch()
    for overwrite in (False, True):
        with pytest.raises(TargetError, match="home"):
            export(str(tiny_checkpoint), tmp_path / "home", ExportRequest(overwrite=overwrite))
    assert names(tmp_path / "home") == ["diary"]


def test_refuses_a_full_disk(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TargetError, match="free, .* free some space"):
        export(str(tiny_checkpoint), tmp_path / "new")
    assert names(tmp_path) == []


def test_nan_in_the_weights_never_becomes_an_engine(
    tiny_checkpoint: Path, copy: Copy, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    checkpoint = copy(tiny_checkpoint)
    file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {key: value.copy() for key, value in load_file(file).items()}
    weights["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"NaN or infinity in conv_in\.weight"):
        export(str(checkpoint), tmp_path / "new", ExportRequest(components=("text_encoder",)))
    assert names(tmp_path) == [checkpoint.name]


# The gate


def test_an_engine_that_differs_from_torch_is_rejected(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "MAX_RELATIVE_ERROR", 0.0)
    target = tmp_path / "new"
    with pytest.raises(GateError, match="text_encoder: the engine differs from torch") as caught:
        export(str(tiny_checkpoint), target, ExportRequest(components=("text_encoder",)))
    assert names(tmp_path) == ["new.rejected"]
    assert str(caught.value).endswith(f"kept as {target}.rejected")
    assert "text_encoder.onnx" in names(tmp_path / "new.rejected")


@pytest.mark.parametrize("wrong", ["scaled", "moved", "nan", "nan, then right"])
def test_the_gate_detects_differences(tiny_engines: Path, wrong: str) -> None:
    part = Manifest.read(tiny_engines, hashes=False).components["text_encoder"]
    ids = {"input_ids": np.arange(24, dtype=np.int64)[None]}
    right = Engine.load("text_encoder", part, tiny_engines, {}).run(ids)["last_hidden_state"]
    sound = (ids, {"last_hidden_state": right})
    recording = parity.ComponentRecording([sound])
    assert parity.check_parity("text_encoder", part, tiny_engines, recording)["psnr"] > 100
    changes = {"scaled": right * 1.01, "moved": np.roll(right, 1, 1)}
    other = changes.get(wrong, np.full_like(right, np.nan))
    broken = parity.ComponentRecording([(ids, {"last_hidden_state": other}), sound])
    if wrong == "nan":
        broken.runs.reverse()
    with pytest.raises(GateError, match="differs from torch"):
        parity.check_parity("text_encoder", part, tiny_engines, broken)


@pytest.mark.parametrize("joined", [True, False])
def test_the_quick_rule_of_slices_finds_the_same(joined: bool) -> None:
    start = 4 if joined else 3
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
    m (float[2, 4, 8] x) => (float[2, 4, 4] y)
    <int64[1] none = {{0}}, int64[1] half = {{4}}, int64[1] axis = {{2}},
     int64[1] start = {{{start}}}, int64[1] end = {{{start + 4}}}>
    {{
      h = Relu(x)
      b = Slice(h, start, end, axis)
      a = Slice(h, none, half, axis)
      y = Mul(a, b)
    }}"""
    models = [ir.from_onnx_text(text) for _ in range(2)]
    optimizer.optimize(models[0])
    with quick_slice_rule():
        optimizer.optimize(models[1])
    plain, quick = (ir.to_proto(model).SerializeToString() for model in models)
    assert plain == quick
    assert ("Split" in {node.op_type for node in models[1].graph}) == joined


# Interruptions

TEXT_ENCODER = ExportRequest(components=("text_encoder",), dimensions=Dimensions(batch=1))


def forked(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a process that is forked from one whose imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["latentforge.export.stage"])
    ready = context.Process(target=time.sleep, args=(0,))
    ready.start()
    ready.join()
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


@pytest.fixture(scope="module")
def duration(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds of such an export without interruption."""
    target = tmp_path_factory.mktemp("whole") / "new"
    process = forked(export, str(tiny_checkpoint), target, TEXT_ENCODER)
    start = time.monotonic()
    process.join(timeout=200)
    assert process.exitcode == 0
    Manifest.read(target)
    return time.monotonic() - start


def kill_after(seconds: float, checkpoint: Path, target: Path) -> None:
    process = forked(export, str(checkpoint), target, TEXT_ENCODER)
    process.join(timeout=seconds)
    process.kill()
    process.join(timeout=100)
    assert process.exitcode is not None


def check_killed_anywhere(
    moments: list[float], checkpoint: Path, parent: Path, duration: float
) -> None:
    target = parent / "new"
    for moment in moments:
        shutil.rmtree(target, ignore_errors=True)
        kill_after(moment * duration, checkpoint, target)
        if target.exists():
            assert list(Manifest.read(target).components) == ["text_encoder"]
    assert names(parent)  # leftovers, for the next one to remove
    export(str(checkpoint), target, replace(TEXT_ENCODER, overwrite=True))
    Manifest.read(target)
    assert names(parent) == ["new"]


def test_a_kill_leaves_a_whole_directory_or_none(
    tiny_checkpoint: Path, tmp_path: Path, duration: float, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random()
    moments = [rng.uniform(low, low + 0.3) for low in (0.1, 0.4, 0.7)]
    check_killed_anywhere(moments, tiny_checkpoint, tmp_path, duration)
    assert capfd.readouterr() == ("", ""), moments  # of the export after the kills, which is quiet


@pytest.mark.slow
def test_twenty_kills(tiny_checkpoint: Path, tmp_path: Path, duration: float) -> None:
    moments = [(index + 0.5) / 20 for index in range(20)]
    check_killed_anywhere(moments, tiny_checkpoint, tmp_path, duration)


@pytest.mark.parametrize("part", ["recording", "exporting"])
def test_ctrl_c_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, part: str) -> None:
    parent, log = tmp_path / "deep", tmp_path / "said"
    request = replace(TEXT_ENCODER, dimensions=Dimensions(), quiet=False)
    process = forked(logged, log, export, str(tiny_checkpoint), parent / "new", request)

    def begun() -> bool:
        if part == "exporting":
            return log.exists() and "recording a run in torch" in log.read_text()
        return bool(list(parent.glob(".new.partial-*/tokenizer/*")))

    while not begun():
        assert process.exitcode is None
        time.sleep(0.01)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=100)
    assert process.exitcode == 1
    assert log.read_text().rstrip().endswith("KeyboardInterrupt")
    assert names(tmp_path) == ["said"]
