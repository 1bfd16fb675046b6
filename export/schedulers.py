"""Conversion of a checkpoint's scheduler_config.json to the runtime's schedule and sampler."""

import logging
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from latentforge.runtime.errors import CheckpointError, ManifestError
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.sampling.dpmpp_2m import DPM_SCHEDULER
from latentforge.runtime.sampling.prediction import Prediction
from latentforge.runtime.sampling.sampler import Sampler
from latentforge.runtime.sampling.schedule import Schedule

__all__ = [
    "SCHEDULERS",
    "Counterpart",
    "corrected",
    "default_sampler",
    "prediction_of",
    "schedule_of",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """diffusers scheduler that a sampler is numerically equal to.

    Attributes:
        scheduler: class name.
        options: arguments of its from_config, besides the checkpoint's own configuration.
        timesteps: (schedule, steps) -> argument of its set_timesteps, in place of a number of
            steps; None if it computes the timesteps itself.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    timesteps: Callable[[Schedule, int], list[int]] | None = None

    @classmethod
    def of(cls, sampler: Sampler) -> "Counterpart":
        """Return the counterpart that a sampler names."""

        def timesteps(schedule: Schedule, steps: int) -> list[int]:
            return [int(time) for time in sampler.plan(schedule, steps).timesteps]

        row = sampler.diffusers
        explicit = timesteps if row.explicit_timesteps else None
        return cls(scheduler=row.name, options=row.options, timesteps=explicit)


SCHEDULERS: Mapping[str, Counterpart] = {
    name: Counterpart.of(sampler) for name, sampler in SAMPLERS.items()
}
"""diffusers scheduler of each sampler, from the runtime's table of samplers."""

_OPTIONS = {"use_karras_sigmas": False, "algorithm_type": "dpmsolver++"}


def corrected(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler_config.json with the corrections that StableDiffusionPipeline makes.

    Some files predate two options that latent diffusion needs at fixed values; diffusers sets them
    in the pipeline's constructor, with a deprecation warning.
    """
    return {**config, "steps_offset": 1, "clip_sample": False}


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """Return the noise schedule that a scheduler_config.json describes.

    Raises:
        CheckpointError: the schedule is malformed or not supported.
    """
    betas = config.get("trained_betas")
    if config.get("thresholding"):
        raise CheckpointError(
            "scheduler_config.json: thresholding is for models of pixels, not of latents"
        )
    fields = {
        "train_steps": config.get("num_train_timesteps", 1000),
        "beta_kind": "explicit" if betas else config.get("beta_schedule", "linear"),
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
        "betas": betas or (),
        "spacing": config.get("timestep_spacing"),
        "offset": config.get("steps_offset", 0),
        "zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
        "final_alpha_one": config.get("set_alpha_to_one"),
    }
    try:
        return msgspec.convert(fields, Schedule)
    except (ManifestError, msgspec.ValidationError) as error:
        raise CheckpointError(f"scheduler_config.json: {error}") from error


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    """Return the prediction type that the denoiser was trained for.

    Raises:
        CheckpointError: the prediction type is not supported.
    """
    match config.get("prediction_type", "epsilon"):
        case "epsilon":
            return "epsilon"
        case "v_prediction":
            return "v_prediction"
        case other:
            raise CheckpointError(
                f"scheduler_config.json: prediction_type {reprlib.repr(other)} is not epsilon or "
                "v_prediction"
            )


def default_sampler(config: Mapping[str, Any]) -> str:
    """Return the sampler that corresponds to the checkpoint's scheduler; dpmpp_2m if none does."""
    options = {key: config.get(key, default) for key, default in _OPTIONS.items()}
    for name, reference in SCHEDULERS.items():
        row_options = {
            key: reference.options.get(key, default) for key, default in _OPTIONS.items()
        }
        if reference.scheduler != config.get("_class_name") or reference.timesteps:
            continue
        if reference.scheduler != DPM_SCHEDULER or row_options == options:
            return name
    _log.warning("no sampler corresponds to %s: using dpmpp_2m", config.get("_class_name"))
    return "dpmpp_2m"
