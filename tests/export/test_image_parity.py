"""The engines' image is compared with that of diffusers and of the checkpoint's own scheduler."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

from safetensors.torch import load_file, save_file

from latentforge.export import image_parity
from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import family_of
from latentforge.export.image_parity import ImageParity, ImageReference, check_image
from latentforge.export.reference.eager import EagerPipeline
from latentforge.export.reference.sequential import SequentialModules
from latentforge.export.schedulers import follows
from latentforge.measure import hardware
from latentforge.runtime import sampling
from latentforge.runtime.errors import CheckpointError, GateError
from latentforge.runtime.loader import load
from latentforge.runtime.pipeline import Result
from latentforge.runtime.progress import Progress

Copy = Callable[[Path], Path]
Run = Callable[[Any, Any], Result]


def in_torch(checkpoint: Path) -> Run:
    """Return a run over torch modules that follows the settings' sampler."""
    return lambda settings, _: EagerPipeline(open_checkpoint(str(checkpoint)))(settings)


def compared(engines: Path, checkpoint: Path, run: Run, **changes: Any) -> ImageParity:
    opened = open_checkpoint(str(checkpoint))
    fields: dict[str, Any] = {"checkpoint": opened, "own_scheduler": True, **changes}
    return check_image(engines, ImageReference(**fields), run, Progress(1))


def unused(*_: object) -> Result:
    raise AssertionError("torch only runs to find the cause of a difference")


@pytest.fixture
def changed(tiny_checkpoint: Path, copy: Copy) -> Callable[..., Path]:
    """A function that returns the tiny checkpoint with changes to its scheduler's configuration."""

    def checkpoint(**changes: Any) -> Path:
        path = copy(tiny_checkpoint)
        file = path / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return path

    return checkpoint


def test_the_reference_is_the_checkpoints_own(tiny_engines: Path, tiny_checkpoint: Path) -> None:
    parity = compared(tiny_engines, tiny_checkpoint, unused, height=16, width=24)
    assert min(parity.figures.values()) > 70
    assert parity.reference == {
        "pipeline": "StableDiffusionPipeline",
        "scheduler": "PNDMScheduler",
        "own_scheduler": True,
        "sequential": False,
        "sampler": "pndm",
        "steps": 5,
        "height": 16,
        "width": 24,
    }
    assert "dB to that of diffusers' StableDiffusionPipeline with PNDM" in parity.summary


def test_little_memory_loads_modules_in_turn(
    tiny_engines: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = compared(tiny_engines, tiny_checkpoint, unused)
    monkeypatch.setattr(hardware, "available_memory", lambda: 1 << 20)
    in_turn = compared(tiny_engines, tiny_checkpoint, unused)
    assert (together.reference["sequential"], in_turn.reference["sequential"]) == (False, True)
    assert in_turn.figures == together.figures
    assert in_turn.summary.endswith("its modules were loaded in turn")


def test_sequential_modules_hold_one_modules_weights(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    reads: list[str] = []

    def counted(part: str, module: Callable[[Checkpoint], Any]) -> Callable[[Checkpoint], Any]:
        return lambda opened: (reads.append(part), module(opened))[1]

    plans = family_of(checkpoint).plan(checkpoint).components
    loaders = {plan.part: counted(plan.part, plan.module) for plan in plans}
    modules = SequentialModules(checkpoint, loaders).modules
    assert [part for part in modules if held(modules[part])] == []
    vae: Any = modules["vae"]
    for part, latents in (("vae", True), ("text_encoder", False), ("text_encoder", False)):
        if latents:
            vae.encode(vae.encoder.conv_in.weight.new_zeros(1, 3, 8, 8))
        else:
            modules[part](vae.encoder.conv_in.weight.new_zeros(1, 24).long())
        assert [other for other in modules if held(modules[other])] == [part]
    assert reads == ["text_encoder", "unet", "vae", "vae", "text_encoder"]


def held(module: Any) -> int:
    """Return the weights that a module has in memory, less the ones that are a broadcast zero."""
    return sum(p.numel() for p in module.parameters() if p.untyped_storage().nbytes() > 4)


# Causes of a difference


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear"},
        {"beta_end": 0.013},
        {"timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction"},
    ],
)
def test_a_schedule_that_is_not_followed_is_detected(
    tiny_engines: Path, changed: Callable[..., Path], tiny_checkpoint: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(GateError, match="the denoising loop or its schedule differs"):
        compared(tiny_engines, changed(**changes), in_torch(tiny_checkpoint))


def test_a_sampler_that_is_not_followed_is_detected(
    tiny_engines: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PNDM's timesteps with Euler's steps."""
    wrong = replace(sampling.SAMPLERS["pndm"], method=sampling.SAMPLERS["euler"].method)
    monkeypatch.setattr(sampling, "SAMPLERS", {**sampling.SAMPLERS, "pndm": wrong})

    def loop(settings: Any, _: Any) -> Result:
        with load(tiny_engines) as pipeline:
            return pipeline.run(settings)

    for own in (True, False):
        with pytest.raises(GateError, match="sampler pndm does not follow .* must reach 40 dB"):
            compared(tiny_engines, tiny_checkpoint, loop, own_scheduler=own)


def test_engines_that_differ_from_torch_are_detected(
    tiny_engines: Path, tiny_checkpoint: Path, copy: Copy
) -> None:
    checkpoint = copy(tiny_checkpoint)
    file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {key: value * 1.1 for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(GateError, match="the engines differ from torch: latents and image are"):
        compared(tiny_engines, checkpoint, in_torch(checkpoint))


def test_a_scheduler_that_diffusers_refuses_is_an_error_of_the_checkpoint(
    tiny_engines: Path, changed: Callable[..., Path]
) -> None:
    checkpoint = changed(beta_schedule="other")
    with pytest.raises(CheckpointError, match=r"PNDMScheduler cannot run .*: other is not impl"):
        compared(tiny_engines, checkpoint, unused)


# Choice of the scheduler and of the request


@pytest.mark.parametrize(
    ("sampler", "scheduler", "own"),
    [
        ("pndm", {"_class_name": "PNDMScheduler", "skip_prk_steps": True}, True),
        ("euler", {"_class_name": "PNDMScheduler"}, False),
        ("dpmpp_2m", {"_class_name": "SomeScheduler"}, False),
        ("dpmpp_2m", {"_class_name": "DPMSolverMultistepScheduler"}, True),
        ("dpmpp_2m_karras", {"_class_name": "DPMSolverMultistepScheduler"}, False),
        ("euler_ancestral", {"_class_name": "EulerAncestralDiscreteScheduler"}, True),
        ("squeezed_10", {"_class_name": "DPMSolverMultistepScheduler"}, False),
    ],
)
def test_own_schedulers(sampler: str, scheduler: dict[str, Any], own: bool) -> None:
    assert follows(sampler, scheduler) is own


def test_large_fixed_sizes_take_fewer_steps(
    tiny_engines: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_parity, "_LARGE", 16 * 16)
    parity = compared(tiny_engines, tiny_checkpoint, unused, height=16, width=16)
    assert parity.reference["steps"] == 2
