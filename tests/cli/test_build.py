"""Builds: one target, the fastest of several, estimates, and errors before any work."""

import shutil
from pathlib import Path

import pytest
from conftest import Handmade

from latentforge.__main__ import main
from latentforge.build import BuildRequest, build, dimensions, estimate, optimize_and_compile
from latentforge.build_plan import CheckpointSize, StageEstimates
from latentforge.commands.arguments import parse_ranges
from latentforge.export.onnx import Dimensions
from latentforge.optimize.search.backends import select_backends, tune_rows
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.runtime import backends
from latentforge.runtime.backends import cuda
from latentforge.runtime.compile.plan import CompileRequest, plan_compilation
from latentforge.runtime.compile.stage import compile_into
from latentforge.runtime.errors import (
    BackendError,
    DeviceError,
    GateError,
    ManifestError,
    SettingsError,
)
from latentforge.runtime.image import psnr
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest, RequestDefaults
from latentforge.runtime.shapes import Sizes


def quick(
    target: str = "cpu", *, recipe: str = "fp32", gate: tuple[str, ...] = ()
) -> OptimizeRequest:
    """Return a request of one step and one image."""
    return OptimizeRequest(
        target=target, recipe=recipe, gate=("images=1", *gate), settings={"steps": 1}, repeats=1
    )


@pytest.fixture(scope="module")
def automatic(small_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino", exc_type=ImportError)
    directory = tmp_path_factory.mktemp("auto")
    optimize_and_compile(small_engines, directory, BuildRequest(optimization=quick("auto")))
    return directory


def test_auto_measures_the_backends_of_this_machine(automatic: Path, small_engines: Path) -> None:
    manifest = Manifest.read(automatic)
    stage = manifest.history[-1]
    assert stage.name == "select" and stage.options["reference"] == "cpu"
    ratios = stage.options["ratios"]["openvino"]
    assert {"text_encoder", "denoiser step", "vae_decoder", "total"} <= ratios.keys()
    assert all(ratio > 0 for ratio in ratios.values())
    chosen = stage.options["chosen"]
    assert chosen.keys() == manifest.components.keys()
    for name, part in (("text_encoder", "text_encoder"), ("denoiser", "denoiser step")):
        if not 0.97 < ratios[part] < 1.07:  # else either may have been taken
            assert chosen[name] == ("openvino" if ratios[part] > 1 else "cpu")
    assert len({chosen[name] for name in chosen if name.startswith("denoiser")}) == 1
    assert chosen["vae_encoder"] == chosen["vae_decoder"]
    for name, component in manifest.components.items():
        assert component.backend == {"cpu": "onnxruntime", "openvino": "openvino"}[chosen[name]]


def test_auto_engines_make_the_same_image(automatic: Path, small_engines: Path) -> None:
    with load(automatic) as ours, load(small_engines) as theirs:
        results = [pipe("red apple", steps=2, seed=3) for pipe in (theirs, ours)]
    assert psnr(results[0].latents, results[1].latents) > 80


def test_auto_leaves_no_other_files(automatic: Path) -> None:
    manifest = Manifest.read(automatic)
    files = {entry.file for entry in manifest.files} | {"manifest.json"}
    found = {p.relative_to(automatic).as_posix() for p in automatic.rglob("*") if p.is_file()}
    assert found == files


@pytest.mark.thorough
def test_a_target_that_is_compiled(small_engines: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    (tmp_path / "rtx").mkdir()
    request = BuildRequest(
        optimization=quick("tensorrt-rtx", recipe="fp16"),
        sizes=Sizes(height=parse_ranges("32"), width=parse_ranges("32,64")),
        options=("capabilities=8.6",),
    )
    optimize_and_compile(small_engines, tmp_path / "rtx", request)
    manifest = Manifest.read(tmp_path / "rtx")
    assert [stage.name for stage in manifest.history] == ["export", "optimize", "compile"]
    unet = manifest.components["denoiser"]
    assert unet.file == "engines/tensorrt-rtx/denoiser.engine" and unet.device["compute capability"]
    assert unet.inputs["sample"].shape[2] == 16 and len(unet.shapes) == 2
    assert "denoiser_prompt" in manifest.components
    files = {p.name for p in (tmp_path / "rtx").iterdir()}
    assert files == {"manifest.json", "tokenizer", "engines"}
    check_that_damage_is_reported(tmp_path / "rtx")


def test_auto_without_a_candidate(small_engines: Path, tmp_path: Path) -> None:
    request = BuildRequest(optimization=quick("auto", gate=("psnr=1000",)))
    with pytest.raises(GateError, match="cpu: .*psnr is .* at least 1000.*openvino: .*psnr is"):
        optimize_and_compile(small_engines, tmp_path, request)
    assert list(tmp_path.iterdir()) == []


def check_that_damage_is_reported(directory: Path) -> None:
    """Check the errors of a truncated engine, of swapped bytes, and of a machine without a GPU."""
    path = directory / "engines" / "tensorrt-rtx" / "denoiser.engine"
    content = path.read_bytes()
    place = next(i for i in range(5000, len(content)) if content[i] != content[i + 1])
    swapped = content[:place] + content[place : place + 2][::-1] + content[place + 2 :]
    for damaged, message in (
        (content[:-1], "truncated or replaced"),
        (swapped, "does not have the sha256"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ManifestError, match=message):
            load(directory)
    path.write_bytes(content)
    if cuda.find_gpu() is None:
        with pytest.raises(DeviceError, match="text_encoder: this needs an NVIDIA GPU"):
            load(directory)


def test_bad_input_costs_no_export(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(tiny_checkpoint), tmp_path / "out"
    for optimization, message in (
        (OptimizeRequest(target="tensort"), "no target 'tensort'; .*tensorrt"),
        (OptimizeRequest(target="auto", recipe="int9"), "no recipe"),
        (OptimizeRequest(gate=("pnsr=3",)), "psnr"),
    ):
        with pytest.raises(SettingsError, match=message):
            build(source, target, BuildRequest(optimization=optimization))
    if "tensorrt" not in installed():
        with pytest.raises(BackendError, match=r"pip install 'latentforge\[tensorrt\]'"):
            build(source, target, BuildRequest(optimization=quick("tensorrt")))
    assert main(["build", source, str(target), "--batch", "1:4"]) == 2
    assert main(["build", source, str(target), "--layout", "optimum", "--batch", "1,4"]) == 2
    assert main(["build", source, str(target), "--layout", "optimum", "--target", "auto"]) == 2
    assert "give no recipe" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def installed() -> list[str]:
    able = []
    for name in backends.BACKENDS:
        try:
            backends.get(name)
        except BackendError:
            continue
        able.append(name)
    return able


def test_a_dry_run_prints_steps_and_resources(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(tiny_checkpoint), str(tmp_path / "out"), "--dry-run"]
    assert main([*arguments, "--height", "32,64", "--precision", "fp16"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "  unet: ",
        "1. export, and compare with torch and diffusers: about",
        "2. optimize by recipe fp16, for cpu",
        "3. compile with onnxruntime for height 32,64: about",
        "4. time guidance in runs of one row",
        "time: about",
        ", for a budget of 15m; measured anew after the export",
        "memory: up to",
        " free",
        "disk: up to",
    ):
        assert words in printed
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_is_data(tiny_checkpoint: Path) -> None:
    plan = estimate(str(tiny_checkpoint))
    assert {"text_encoder", "unet", "vae"} <= plan.weights.keys()
    assert [stage.name for stage in plan.stages] == ["export", "optimize", "rows"]
    assert plan.disk == 2 * sum(plan.weights.values())
    assert plan.memory == max(stage.memory for stage in plan.stages) > sum(plan.weights.values())
    assert plan.seconds == sum(stage.seconds or 0 for stage in plan.stages) > 10
    assert plan.budget is None


def test_a_budget_bounds_the_estimate_down_to_its_floor(tiny_checkpoint: Path) -> None:
    """Full-size Stable Diffusion on a machine of 150 GFLOP/s, without its checkpoint."""
    size = CheckpointSize(
        weights={"text_encoder": 492_000_000, "unet": 3_438_000_000, "vae": 334_000_000},
        rows=2,
        positions=64 * 64,
        steps=50,
    )

    def seconds(budget: float | None, recipe: str = "fp32") -> float:
        request = OptimizeRequest(budget=budget, recipe=recipe)
        estimates = StageEstimates(size=size, request=request, targets=("cpu",), compiled=())
        vars(estimates)["speed"] = 150e9  # as if measured
        stages = [estimates.export(), estimates.optimize("cpu"), *estimates.choose()]
        return sum(stage.seconds or 0 for stage in stages)

    assert size.judged_memory() == pytest.approx(8.1e9, rel=0.2)  # measured without torch
    assert seconds(None) > 3600
    assert seconds(1800) == pytest.approx(1800)
    assert 300 < seconds(1) < 900
    assert seconds(1, "int8") > seconds(1)


def test_a_build_that_does_not_fit_is_refused_before_it_starts(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentforge.build.total_memory", lambda: 1000)
    with pytest.raises(BackendError, match=r"stage optimize of .* takes up to 1.6 GB of memory"):
        build(str(tiny_checkpoint), tmp_path / "out", BuildRequest())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_a_build_records_what_it_was_predicted_to_take(
    tiny_checkpoint: Path,
    small_engines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The export, which has its own tests, is replaced by a copy of what it wrote before."""
    monkeypatch.setattr(
        "latentforge.build.export",
        lambda _, path, __: Manifest.read(shutil.copytree(small_engines, path)),
    )
    arguments = ["build", str(tiny_checkpoint), str(tmp_path / "out"), "--budget=10s"]
    assert main(arguments) == 0
    *_, optimized, stage = Manifest.read(tmp_path / "out").history
    assert (optimized.name, stage.name) == ("optimize", "build")
    options, sizing = stage.options, optimized.options["sizing"]
    assert options["budget"] == sizing["budget"] == 10
    assert options["estimated"].keys() == {"seconds", "memory", "disk"}
    predicted = sizing["reserved"] + sum(sizing["predicted"].values())
    # the prediction is made once a step was measured, and counts that time too
    assert predicted - 1 <= options["predicted_seconds"] <= predicted + stage.seconds
    assert stage.measured["build"]["peak_memory"] > 100e6
    assert stage.seconds >= optimized.seconds
    out = capsys.readouterr().out
    assert "\ntook " in out and " at its peak, estimated " in out


def test_too_little_memory_is_a_warning(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentforge.build.available_memory", lambda: 1000)
    plan = estimate(str(tiny_checkpoint))
    assert plan.free_memory == 1000 and "more memory than is free" in plan.warnings[-1]
    assert "WARNING: that is more memory" in str(plan).splitlines()[-1]


def test_the_estimate_of_exported_graphs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A directory that optimum exported has no weights to count."""
    checkpoint = tmp_path / "exported"
    shutil.copytree(tiny_checkpoint, checkpoint, ignore=shutil.ignore_patterns("*.safetensors"))
    (checkpoint / "unet" / "model.onnx").write_bytes(bytes(5_000_000))
    assert estimate(str(checkpoint)).weights == {"graphs": 5_000_000}


def test_a_single_size_is_fixed_in_the_graphs() -> None:
    sizes = Sizes(height=parse_ranges("64"), width=parse_ranges("64,96"))
    assert dimensions(sizes) == Dimensions(height=64)


def test_the_faster_component_is_selected(
    small_engines: Path, tmp_path: Path, copy: object
) -> None:
    """Engines that compute nothing are the faster ones."""
    real, nothing = (Path(copy(small_engines)), tmp_path / "nothing")  # type: ignore[operator]
    nothing.mkdir()
    with pytest.raises(GateError):
        compile_into(
            plan_compilation(
                real,
                CompileRequest(backend="onnxruntime", component_backends={"vae_decoder": "null"}),
            ),
            nothing,
        )
    assert Manifest.read(nothing).components["vae_decoder"].backend == "null"
    target = tmp_path / "chosen"
    target.mkdir()
    manifest = select_backends({"real": real, "nothing": nothing}, target, repeats=2)
    chosen = manifest.history[-1].options["chosen"]
    assert chosen["vae_decoder"] == chosen["vae_encoder"] == "nothing"
    assert Manifest.read(target).components["vae_decoder"].file == "engines/null/vae_decoder.null"


# Multiplies each row of all images with each other one: what two take is four times one's.
GROWING = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, h, w] sample, float[1] timestep, float[batch, 8, 2] encoder_hidden_states)
  => (float[batch, 4, h, w] out_sample)
<int64[2] flat = {-1, 64}, int64[2] times = {12, 1}, float none = {0}>
{
  rows = Reshape(sample, flat)
  tall = Tile(rows, times)
  turned = Transpose<perm = [1, 0]>(tall)
  square = MatMul(tall, turned)
  most = ReduceMax<keepdims = 0>(square)
  zero = Mul(most, none)
  out_sample = Add(sample, zero)
}"""
# The same for the first image alone: two rows take as long as one.
STEADY = GROWING.replace("rows = Reshape(sample, flat)", """every = Reshape(sample, flat)
  rows = Slice(every, first, last)""").replace(
    "float none", "int64[1] first = {0}, int64[1] last = {256}, float none"
)  # fmt: skip


@pytest.mark.parametrize("unet, rows", [(GROWING, 1), (STEADY, None)])
def test_single_rows_are_preferred_where_faster(
    unet: str, rows: int | None, handmade: Handmade
) -> None:
    defaults = RequestDefaults(
        sampler="ddim", steps=4, guidance_scale=7.5, guidance_rescale=0.0, height=512, width=512
    )
    directory = handmade(onnx={"denoiser": unet}, defaults=defaults)
    assert tune_rows(directory, repeats=2).components["denoiser"].max_rows == rows
    assert Manifest.read(directory).components["denoiser"].max_rows == rows


def test_rows_are_not_tuned_without_guidance(handmade: Handmade) -> None:
    defaults = RequestDefaults(
        sampler="ddim", steps=4, guidance_scale=1.0, guidance_rescale=0.0, height=512, width=512
    )
    directory = handmade(onnx={"denoiser": GROWING}, defaults=defaults)
    assert tune_rows(directory).components["denoiser"].max_rows is None
