"""Multistep latent consistency sampling: Luo et al. (2023), arXiv 2310.04378."""

import math
from collections.abc import Sequence

import numpy as np

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.ddim import CLIP_OPTIONS
from latentforge.runtime.sampling.levels import NoisePlan, chain
from latentforge.runtime.sampling.moves import blend, clipped
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import check_steps, level_at

__all__ = ["LCM", "distilled_timesteps", "plan_lcm", "plan_lcm_from_timesteps"]

_OPTIONS = CLIP_OPTIONS | {"original_inference_steps", "timestep_scaling"}


def distilled_timesteps(schedule: Schedule, steps: int) -> list[float]:
    """Return an even choice of the timesteps of distillation, highest first (section 4.3).

    Raises:
        SettingsError: more steps than timesteps.
    """
    limit = min(schedule.options.original_inference_steps, schedule.train_steps)
    if check_steps(schedule, steps) > limit:
        raise SettingsError(f"{steps} steps: a latent consistency model takes at most {limit}")
    skip = schedule.train_steps // limit
    index = np.linspace(0, limit, steps, endpoint=False).astype(np.int64)
    return [(limit - i) * skip - 1 for i in index.tolist()]


def plan_lcm(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan timesteps of the model's distillation, down to the clean latent."""
    return plan_lcm_from_timesteps(schedule, distilled_timesteps(schedule, steps))


def plan_lcm_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan these timesteps, down to the clean latent; the model may not be distilled on them."""
    levels = [level_at(schedule, t) for t in timesteps]
    return NoisePlan(chain(levels), options=schedule.options)


def _lcm(run: SamplerRun, x: Array) -> Updates:
    """Jump to the clean latent in each step, and add noise again in all but the last."""
    options = run.plan.options
    for start, end in run.plan.intervals:
        # Boundary condition of consistency models, with sigma_data 0.5.
        time = options.timestep_scaling * start.timestep
        skip, out = 0.25 / (time**2 + 0.25), time / math.sqrt(time**2 + 0.25)
        denoised = blend((out, clipped(run.denoise(x, start), options)), (skip, x))
        x = blend((end.alpha, denoised), (end.sigma, run.noise())) if end.sigma else denoised
        x = yield x, denoised


LCM = Sampler(
    name="lcm",
    summary="for latent consistency models, 1 to 8 steps (Luo et al. 2023)",
    plan=plan_lcm,
    plan_from_timesteps=plan_lcm_from_timesteps,
    method=_lcm,
    diffusers=DiffusersScheduler(name="LCMScheduler", follows=_OPTIONS),
)
