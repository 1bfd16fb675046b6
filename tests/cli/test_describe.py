"""Descriptions of manifests and stages: every figure that a stage records is shown."""

from typing import Any

import msgspec
import pytest
from conftest import Handmade

from latentforge.commands.describe import describe, stage_lines
from latentforge.runtime.kernels import InstructionSets
from latentforge.runtime.manifest import (
    AccelerationPlan,
    Component,
    Manifest,
    PreviewMap,
    ScheduleProof,
    Stage,
)
from latentforge.runtime.shapes import Range

PLAN = AccelerationPlan(
    sampler="euler",
    steps=4,
    timesteps=(900, 600.5, 300, 20),
    guidance_interval=(0.25, 0.75),
    measured={"speedup": 2.125, "psnr": 24.06},
)
SIZES = {"bytes_before": 4e6, "bytes_after": 1e6, "nodes_before": 20.0, "nodes_after": 15.0}
TIMES = {
    "speedup": 2.0,
    "speedup_low": 1.5,
    "speedup_high": 2.5,
    "speedup_level": 0.9375,
    "denoiser_step_speedup": 2.25,
    "memory_before": 4e6,
    "memory_after": 2e6,
}


def stage(name: str, **changes: Any) -> Stage:
    fields: dict[str, Any] = {"options": {}, "tools": {}, "seconds": 1.0, **changes}
    return Stage(name=name, **fields)


def optimized(precision: str, **image: float) -> Stage:
    options = {"recipe": "r", "target": "cpu", "settings": {"precision": {"default": precision}}}
    measured = {"denoiser": SIZES, "image": {"images": 4.0, **image}}
    return stage("optimize", options=options, passes={"denoiser/gelu": 3}, measured=measured)


def described(handmade: Handmade, **changes: Any) -> str:
    return describe(Manifest.read(handmade(**changes)))


def test_a_description_has_the_plan_and_every_component_and_stage(handmade: Handmade) -> None:
    history = (stage("export", tools={"torch": "2.9"}, seconds=61.0), optimized("fp32"))
    text = described(handmade, history=history, acceleration=PLAN)
    assert "plan        euler, 4 steps at 900, 600.5, 300, 20; guidance for sigma from 0.25" in text
    assert "speedup 2.12, psnr 24.1 dB" in text
    assert "export: 61 s with torch 2.9" in text and "  denoiser/gelu: 3" in text
    for name in ("text_encoder", "denoiser", "vae_decoder"):
        assert f"\n{name}: " in text and f"\n{name:<18}null" in text


def test_a_description_has_the_instruction_sets_of_own_operators(
    handmade: Handmade, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.read(handmade())
    assert "kernels" not in describe(manifest)
    denoiser = msgspec.structs.replace(manifest.components["denoiser"], custom_ops=True)
    manifest = msgspec.structs.replace(manifest, components={"denoiser": denoiser})
    sets = InstructionSets(
        used="avx2", supported=("avx2", "portable"), compiled=("avx512", "avx2", "portable")
    )
    monkeypatch.setattr("latentforge.commands.describe.instruction_sets", lambda: sets)
    text = describe(manifest)
    assert "\nkernels     avx2, of avx2, portable on this processor\n" in text
    assert "\n            compiled without avx512_bf16, amx, which the C++ compiler lacked" in text
    monkeypatch.setattr("latentforge.commands.describe.instruction_sets", lambda: None)
    assert "\nkernels     not compiled here" in describe(manifest)


def test_a_description_has_the_quality_of_previews(handmade: Handmade) -> None:
    weights = ((1.0, 0.0, 0.0, 0.0),) * 3
    preview = PreviewMap(offset=(0.0, 0.0, 0.0), weights=weights, correlation=0.978)
    text = described(handmade, preview=preview)
    assert "\npreviews    correlate 0.98 with the decoder's images\n" in text
    assert "previews" not in described(handmade, name="none")


def test_a_description_has_the_options_of_the_scheduler_that_are_followed(
    handmade: Handmade,
) -> None:
    proof = ScheduleProof(
        scheduler="EulerDiscreteScheduler",
        sampler="euler",
        options={"use_karras_sigmas": True, "trained_betas": None},
        steps=(4, 20),
        difference=2e-6,
    )
    text = described(handmade, schedule_proof=proof)
    assert "\nscheduler   EulerDiscreteScheduler, followed: use_karras_sigmas True\n" in text
    assert "\n            euler differs by 2e-06 of the range at most, at 4, 20 steps\n" in text


@pytest.mark.parametrize(("own", "owner"), [(True, "the checkpoint's"), (False, "the sampler's")])
def test_a_description_has_the_image_that_an_export_was_compared_with(
    handmade: Handmade, own: bool, owner: str
) -> None:
    reference = {
        "pipeline": "StableDiffusionPipeline",
        "scheduler": "PNDMScheduler",
        "own_scheduler": own,
        "sequential": False,
        "sampler": "pndm",
        "steps": 5,
        "height": 64,
        "width": 96,
    }
    image = {"latents_psnr": 98.25, "psnr": 90.0}
    exported = stage("export", options={"reference": reference}, measured={"image": image})
    for history in ((exported,), (exported, optimized("fp32"))):
        fields = {"history": history, "quality": {"image": image}}
        text = described(handmade, name=f"after-{len(history)}", **fields)
        assert f"image against diffusers' StableDiffusionPipeline, {owner} PNDMScheduler" in text
        assert "  pndm, 5 steps at 96x64: latents_psnr 98.2 dB, psnr 90.0 dB" in text
        assert ("\nimage against input: " in text) == (len(history) > 1)


def test_a_description_has_what_an_engine_was_built_for(handmade: Handmade) -> None:
    directory = handmade()
    manifest = Manifest.read(directory)
    restricted: Component = msgspec.structs.replace(
        manifest.components["denoiser"],
        shapes=({"batch": Range(1, 2, 4)},),
        max_rows=2,
        device={"gpu": "some"},
        options={"tf32": True},
    )
    components = {**manifest.components, "denoiser": restricted}
    lines = describe(msgspec.structs.replace(manifest, components=components)).splitlines()
    for line in ("for batch 1:2:4", "fastest with 2 rows per run", "gpu some", "tf32 True"):
        assert f"denoiser: {line}" in lines


@pytest.mark.parametrize(
    ("precision", "psnr", "expected"),
    [
        ("fp32", 41.0, "class A"),
        ("fp32", 39.0, "class B"),
        ("fp16", 31.0, "class A"),
        ("int8", 90.0, "class B"),
    ],
)
def test_an_optimize_stage_names_its_class(precision: str, psnr: float, expected: str) -> None:
    lines = list(stage_lines(optimized(precision, psnr=psnr)))
    (line,) = (line for line in lines if line.startswith("4 images at equal seeds"))
    assert f"psnr {psnr:.1f} dB" in line and expected in line
    assert lines[-1] == "not timed"


def test_an_optimize_stage_shows_sizes_and_speed() -> None:
    lines = list(stage_lines(optimized("fp32", psnr=60.0, **TIMES)))
    (row,) = (line for line in lines if line.startswith("denoiser"))
    assert row.split() == ["denoiser", "20", "->", "15", "4.0", "->", "1.0", "25.0%"]
    assert any(line.split() == ["total", "4.0", "->", "1.0", "25.0%"] for line in lines)
    assert lines[-1] == (
        "images 2.00x faster (1.50 to 2.50, 93.8 % interval), denoiser step 2.25x, memory 4 -> 2 MB"
    )
    slower = {**TIMES, "speedup": 0.5}
    assert "2.00x SLOWER" in list(stage_lines(optimized("fp32", psnr=60.0, **slower)))[-1]


def test_an_optimize_stage_shows_candidates_and_layers_kept_in_float() -> None:
    candidates = {"a": {"speedup": 2.0, "psnr": 30.0}, "b": {"failures": ["image: psnr 9"]}}
    layer = {"name": "conv", "error": 0.25, "bytes": 2000, "seconds": 0.001}
    options = {
        "candidates": candidates,
        "chosen": "a",
        "layers": [{**layer, "kept_float": True}, {**layer, "name": "x", "kept_float": False}],
    }
    assert list(stage_lines(stage("optimize", options=options))) == [
        "* a: 2.00x, psnr 30.0 dB",
        "  b: fails its gate: image: psnr 9",
        "2 layers measured one by one, 1 kept in float",
        "  conv: error 2.5e-01, would save 2 kB and 1.00 ms per step",
    ]


def test_a_compile_stage_shows_each_build() -> None:
    figures = {"bytes_before": 4e6, "bytes_after": 1e6, "build_seconds": 9.5, "build_memory": 3e6}
    options = {"backends": {"denoiser": "openvino"}}
    built = stage("compile", options=options, measured={"denoiser": figures})
    _, row, last = stage_lines(built)
    assert row.split()[:2] == ["denoiser", "openvino"] and row.endswith("9.5 s        3 MB")
    assert last == "not run on this machine"
    measured = {"denoiser": figures, "image": {"psnr": 61.0}}
    compared = list(stage_lines(stage("compile", options=options, measured=measured)))
    assert compared[-1] == "one step against the input: psnr 61.0 dB"


def test_a_select_stage_shows_choices_and_refusals() -> None:
    options = {
        "backends": {"denoiser": "openvino"},
        "chosen": {"denoiser": "openvino"},
        "reference": "cpu",
        "ratios": {"openvino": {"denoiser step": 1.5}},
        "refused": {"cuda": "no GPU"},
    }
    assert list(stage_lines(stage("select", options=options))) == [
        "denoiser: openvino",
        "openvino, speedup over cpu: denoiser step 1.50x",
        "cuda was refused: no GPU",
    ]


@pytest.mark.parametrize(("plan", "ending"), [("8 steps", "8 steps"), ("", "stay unaccelerated")])
def test_a_search_stage_shows_the_selected_plan(plan: str, ending: str) -> None:
    options = {"plans": [{}, {}], "gate": "psnr=20", "plan": plan}
    (line,) = stage_lines(stage("search", options=options))
    assert line.startswith("2 plans judged by psnr=20; selected: ") and line.endswith(ending)
