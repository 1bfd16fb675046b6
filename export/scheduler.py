"""A checkpoint's scheduler_config.json, in our terms."""

import logging
import reprlib
from collections.abc import Mapping
from typing import Any

import msgspec

from latentforge.runtime.errors import CheckpointError, ManifestError
from latentforge.runtime.schedules import Prediction, Schedule

__all__ = ["SCHEDULERS", "corrected", "default_sampler", "prediction_of", "schedule_of"]

_log = logging.getLogger(__name__)

SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""The diffusers scheduler, and its options, that each of our samplers follows."""

_OPTIONS = {"use_karras_sigmas": False, "algorithm_type": "dpmsolver++"}


def corrected(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json as StableDiffusionPipeline reads it.

    Some files are older than two options that latent diffusion needs at one value; diffusers
    sets them when the pipeline is made, and says so.
    """
    return {**config, "steps_offset": 1, "clip_sample": False}


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The noise schedule that a scheduler_config.json describes.

    Raises:
        CheckpointError: it is not a schedule of latent diffusion that we know.
    """
    betas = config.get("trained_betas")
    if config.get("thresholding"):
        raise CheckpointError("the scheduler's thresholding is for pixels, and we denoise latents")
    fields = {
        "train_steps": config.get("num_train_timesteps", 1000),
        "beta_kind": "explicit" if betas else config.get("beta_schedule", "linear"),
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
        "betas": betas or (),
        "spacing": config.get("timestep_spacing"),
        "offset": corrected(config)["steps_offset"],
        "zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
        "final_alpha_one": config.get("set_alpha_to_one"),
    }
    try:
        return msgspec.convert(fields, Schedule)
    except (ManifestError, msgspec.ValidationError) as error:
        raise CheckpointError(f"scheduler_config.json: {error}") from error


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    """What the UNet was trained to predict.

    Raises:
        CheckpointError: something that our denoiser does not know.
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
    """Our sampler for the scheduler that a checkpoint comes with."""
    wanted = {key: config.get(key, default) for key, default in _OPTIONS.items()}
    for name, (scheduler, options) in SCHEDULERS.items():
        ours = {key: options.get(key, default) for key, default in _OPTIONS.items()}
        multistep = scheduler == "DPMSolverMultistepScheduler"
        if scheduler == config.get("_class_name") and (not multistep or ours == wanted):
            return name
    _log.warning("no sampler follows %s; taking dpmpp_2m", config.get("_class_name"))
    return "dpmpp_2m"
