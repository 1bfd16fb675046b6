"""DDPM: Ho et al. (2020), arXiv 2006.11239, on any decreasing timesteps."""

import math
from collections.abc import Sequence

import numpy as np

from latentforge.runtime.sampling.ddim import CLIP_OPTIONS
from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan, chain
from latentforge.runtime.sampling.moves import blend, clipped
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import check_steps, level_at, spaced_timesteps

__all__ = ["DDPM"]


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan whole timesteps, down to the clean latent."""
    times = np.round(spaced_timesteps(schedule, check_steps(schedule, steps), "leading"))
    return _plan_from_timesteps(schedule, times.tolist())


def _plan_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan these timesteps, down to the clean latent."""
    levels = [level_at(schedule, t) for t in timesteps]
    return NoisePlan(chain(levels), options=schedule.options.clipping)


def _ddpm(run: SamplerRun, x: Array) -> Updates:
    """Draw from the posterior of the next latent given this one and the clean one (equation 6)."""
    options = run.plan.options
    for interval in run.plan.intervals:
        denoised = clipped(run.denoise(x, interval.start), options)
        fresh = run.noise() if interval.start.timestep > 0 else np.zeros_like(x)
        large = options.variance_type == "fixed_large"
        x = _posterior(x, denoised, interval, fresh, large=large)
        x = yield x, denoised


def _posterior(
    x: Array, clean: Array, interval: NoiseInterval, fresh: Array, *, large: bool
) -> Array:
    """Return the mean and add noise of the posterior's variance, or of beta if it is large."""
    start, end = interval
    kept = (start.alpha / end.alpha) * (end.sigma / start.sigma) ** 2
    beta = 1 - (start.alpha / end.alpha) ** 2
    added = math.sqrt(beta) * (1.0 if large else end.sigma / start.sigma)
    return blend((kept, x), (end.alpha * beta / start.sigma**2, clean), (added, fresh))


DDPM = Sampler(
    name="ddpm",
    summary="first order, with the noise of the training process (Ho et al. 2020)",
    plan=_plan,
    plan_from_timesteps=_plan_from_timesteps,
    method=_ddpm,
    diffusers=DiffusersScheduler(
        name="DDPMScheduler",
        follows=CLIP_OPTIONS | {"variance_type"},
        aliases=("DDPMParallelScheduler",),
    ),
)
