"""A checkpoint's scheduler_config.json, in our terms."""

import logging
from collections.abc import Mapping
from typing import Any

from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.manifest import Prediction
from latentforge.runtime.schedules import Schedule

__all__ = ["SCHEDULERS", "default_sampler", "prediction_of", "schedule_of"]

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


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The noise schedule that a scheduler_config.json describes."""
    betas = config.get("trained_betas")
    return Schedule(
        train_steps=config.get("num_train_timesteps", 1000),
        beta_kind="explicit" if betas else config.get("beta_schedule", "linear"),
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        betas=tuple(betas or ()),
        spacing=config.get("timestep_spacing", _default_spacing(config)),
        offset=config.get("steps_offset", 0),
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        final_alpha_one=config.get("set_alpha_to_one", _ends_clean(config)),
    )


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
            raise CheckpointError(f"prediction_type {other!r} is not epsilon or v_prediction")


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


def _default_spacing(config: Mapping[str, Any]) -> str:
    """What diffusers assumes where the file, often older than the option, is silent."""
    linspace = ("Euler", "Heun", "DPMSolver", "UniPC")
    return "linspace" if str(config.get("_class_name")).startswith(linspace) else "leading"


def _ends_clean(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") not in ("PNDMScheduler",)
