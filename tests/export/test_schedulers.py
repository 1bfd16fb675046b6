"""scheduler_config.json is interpreted as by diffusers, also where options are missing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentforge.export.checkpoint import open_checkpoint
from latentforge.export.families import family_of
from latentforge.export.schedule_proof import TOLERANCE, prove_schedule
from latentforge.export.schedulers import (
    SCHEDULERS,
    CheckpointScheduler,
    corrected,
    default_sampler,
    prediction_of,
    quiet_diffusers,
    schedule_of,
    with_class,
)
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.sampling.schedule import Schedule

diffusers = pytest.importorskip("diffusers")

SD15 = {  # of Stable Diffusion 1.5, without spacing and prediction type
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
MINIMAL = {key: SD15[key] for key in ("_class_name", "beta_schedule", "beta_start", "beta_end")}


def reference(name: str, config: dict[str, Any]) -> Any:
    row = SCHEDULERS[name]
    public = {key: value for key, value in corrected(config).items() if key[0] != "_"}
    return getattr(diffusers, row.scheduler).from_config(public, **row.options)


def test_tables_name_the_same_samplers() -> None:
    assert set(SCHEDULERS) == set(SAMPLERS)


@pytest.mark.parametrize("config", [SD15, MINIMAL], ids=["sd15", "minimal"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not re.match("edm|kdpm2", name)])
def test_timesteps_match_diffusers(name: str, config: dict[str, Any]) -> None:
    theirs = reference(name, config)
    schedule, timesteps = schedule_of(corrected(config)), SCHEDULERS[name].timesteps
    if timesteps:
        theirs.set_timesteps(timesteps=timesteps(schedule, 10))
    else:
        theirs.set_timesteps(10)
    plan = SAMPLERS[name].plan(schedule, 10)
    ours = [interval.start.timestep for interval in plan.intervals]
    expected = theirs.timesteps.numpy()
    if name == "heun":  # two evaluations a step, and every timestep but the first stands twice
        expected = np.concatenate([expected[:1], expected[1::2]])
    np.testing.assert_allclose(ours, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["squeezed_10", "squeezed_11"])
def test_squeezed_levels_match_diffusers(name: str) -> None:
    """With explicit timesteps, also for the config of DeciDiffusion 2.0."""
    config = {
        **SD15,
        "_class_name": "DDIMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
    }
    theirs, timesteps = reference(name, config), SCHEDULERS[name].timesteps
    assert timesteps and default_sampler(config) == "ddim"
    theirs.set_timesteps(timesteps=timesteps(schedule_of(config), 16))
    intervals = SAMPLERS[name].plan(schedule_of(config), 16).intervals
    levels = [*(start for start, _ in intervals), intervals[-1].end]
    ratios = [level.sigma / level.alpha for level in levels]
    np.testing.assert_allclose(ratios, theirs.sigmas.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_last_level_matches_diffusers(name: str) -> None:
    """Without set_alpha_to_one, DDIM ends on the clean latent and PNDM does not."""
    theirs = reference(name, MINIMAL)
    last = SAMPLERS[name].plan(schedule_of(MINIMAL), 10).intervals[-1].end
    assert last.alpha**2 == pytest.approx(float(theirs.final_alpha_cumprod), abs=1e-6)
    assert (last.alpha == 1) == (name == "ddim")


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ({}, "pndm"),
        ({"_class_name": "DDIMScheduler"}, "ddim"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "use_karras_sigmas": True,
                "algorithm_type": "sde-dpmsolver++",
            },
            "dpmpp_2m_sde_karras",
        ),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "euler_ancestral"),
        ({"_class_name": "LCMScheduler"}, "lcm"),
        ({"_class_name": "LMSDiscreteScheduler"}, "lms"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "pndm_prk"),
        ({"_class_name": "DDIMParallelScheduler"}, "ddim"),
        ({"_class_name": "EDMEulerScheduler"}, "edm_euler"),
    ],
)
def test_default_sampler_is_that_of_the_checkpoint(changes: dict[str, Any], sampler: str) -> None:
    assert default_sampler({**SD15, **changes}) == sampler


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "SASolverScheduler"}, "no sampler corresponds to this SASolverScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "cannot use it either"),
        ({"_class_name": "IPNDMScheduler"}, "no noise schedule of betas"),
        ({"_class_name": "NoScheduler"}, "'NoScheduler' is no scheduler of diffusers"),
        ({"_class_name": "torch"}, "is no scheduler of diffusers"),
        ({"_class_name": None}, "is no scheduler of diffusers"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
            "use_flow_sigmas = True of DPMSolverMultistepScheduler is not followed",
        ),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 7}, "solver_order"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            "sigma_min",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_min": -1.0}, "sigma_min must be a pos"),
    ],
    ids=str,
)
def test_what_is_not_followed_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointScheduler.of({**SD15, **changes})


def test_another_sampler_may_be_requested() -> None:
    config = {**SD15, "_class_name": "SASolverScheduler"}
    assert CheckpointScheduler.of(config, "euler").sampler == "euler"
    with pytest.raises(CheckpointError, match="cannot use it either"):
        CheckpointScheduler.of({**SD15, "_class_name": "FlowMatchEulerDiscreteScheduler"}, "euler")


def test_another_class_in_the_index_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert with_class(SD15, {"scheduler": ["diffusers", "PNDMScheduler"]}) == SD15
    assert with_class(SD15, {}) == SD15
    assert caplog.text == ""
    assert with_class(SD15, {"scheduler": ["diffusers", "DDIMScheduler"]}) == SD15
    assert "diffusers would load 'DDIMScheduler'" in caplog.text


def test_the_index_names_the_class_where_the_file_does_not() -> None:
    config = {key: value for key, value in SD15.items() if key != "_class_name"}
    assert with_class(config, {"scheduler": ["diffusers", "PNDMScheduler"]}) == SD15


def test_an_unknown_key_is_named(caplog: pytest.LogCaptureFixture) -> None:
    CheckpointScheduler.of({**SD15, "use_magic_sigmas": True, "more": 1})
    assert "PNDMScheduler has no option use_magic_sigmas" in caplog.text
    assert "(and 1 more)" in caplog.text


@pytest.mark.parametrize(
    ("name", "beta_start", "kind"),
    [
        ("LCMScheduler", 0.00085, "scaled_linear"),
        ("DDIMScheduler", 0.0001, "linear"),
        ("HeunDiscreteScheduler", 0.00085, "linear"),
    ],
)
def test_defaults_are_those_of_the_named_class(name: str, beta_start: float, kind: str) -> None:
    schedule = schedule_of({"_class_name": name})
    assert isinstance(schedule, Schedule)
    assert (schedule.beta_start, schedule.beta_kind) == (beta_start, kind)
    assert schedule.options.clip_sample is None  # each sampler has its own default


@pytest.mark.parametrize("clip", [True, False, None])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_clean_latents_are_clipped_where_the_pipeline_clips_them(
    tiny: Callable[[str], Path], copy: Callable[[Path], Path], name: str, clip: bool | None
) -> None:
    """StableDiffusionPipeline turns the option off, and that of XL follows it."""
    path = copy(tiny(name))
    config = {**SD15, "_class_name": "DDIMScheduler", "clip_sample": clip}
    given = {key: value for key, value in config.items() if value is not None}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(given))
    index = json.loads((path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (path / "model_index.json").write_text(json.dumps(index))
    with quiet_diffusers():
        theirs = diffusers.DiffusionPipeline.from_pretrained(path).scheduler.config.clip_sample
    assert theirs is (name == "sdxl" and clip is not False)
    checkpoint = open_checkpoint(str(path))
    own = checkpoint.config("scheduler", "scheduler_config.json")
    ours = CheckpointScheduler.of(family_of(checkpoint).scheduler(with_class(own, index)))
    assert ours.config.get("clip_sample", True) is theirs
    assert prove_schedule(ours, 20).difference <= TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "odd"},
        {"thresholding": True},
        {"timestep_spacing": "odd"},
        {"num_train_timesteps": 1_000_000_000},
        {"num_train_timesteps": "many"},
        {"beta_start": "\ud800"},
        {"trained_betas": [2.0]},
    ],
    ids=str,
)
def test_refuses_unsupported_schedules(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="scheduler_config.json: "):
        schedule_of({**SD15, **changes})


def test_refuses_other_predictions() -> None:
    assert prediction_of(SD15) == "epsilon"
    assert prediction_of({**SD15, "prediction_type": "sample"}) == "sample"
    with pytest.raises(CheckpointError, match="flow_prediction"):
        prediction_of({**SD15, "prediction_type": "flow_prediction"})
