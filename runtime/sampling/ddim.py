"""DDIM: Song et al. (2021), arXiv 2010.02502."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan
from latentforge.runtime.sampling.moves import clipped_move
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import check_steps, level_at, spaced_timesteps

__all__ = ["CLIP_OPTIONS", "DDIM", "first_order", "plan_ddim", "plan_ddim_from_timesteps"]

CLIP_OPTIONS = frozenset({"clip_sample", "clip_sample_range"})
"""Options of the diffusers schedulers that may clip the clean latent."""


def plan_ddim(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan whole timesteps that each step down by one stride.

    A step need not end where the next one starts: the stride is rounded down.
    """
    stride = schedule.train_steps // check_steps(schedule, steps)
    times = np.round(spaced_timesteps(schedule, steps, "leading")).tolist()
    intervals = tuple(NoiseInterval(schedule.at(t), schedule.at(t - stride)) for t in times)
    return NoisePlan(intervals, options=schedule.options.clipping)


def plan_ddim_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan steps from each timestep to the next, then down by the last stride."""
    stride = timesteps[-2] - timesteps[-1] if len(timesteps) > 1 else schedule.train_steps
    last = schedule.at(min(timesteps[-1] - stride, -1))
    levels = [*(level_at(schedule, t) for t in timesteps), last]
    intervals = tuple(NoiseInterval(*pair) for pair in pairwise(levels))
    return NoisePlan(intervals, options=schedule.options.clipping)


def first_order(run: SamplerRun, x: Array) -> Updates:
    """Step as in equation 12 with eta 0, which is Euler's method in sigma / alpha."""
    for interval in run.plan.intervals:
        denoised = run.denoise(x, interval.start)
        x, denoised = clipped_move(x, denoised, interval, run.plan.options)
        x = yield x, denoised


DDIM = Sampler(
    name="ddim",
    summary="first order, deterministic (Song et al. 2021)",
    plan=plan_ddim,
    plan_from_timesteps=plan_ddim_from_timesteps,
    method=first_order,
    diffusers=DiffusersScheduler(
        name="DDIMScheduler", follows=CLIP_OPTIONS, aliases=("DDIMParallelScheduler",)
    ),
)
