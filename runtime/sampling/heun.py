"""Heun's method: Karras et al. (2022), arXiv 2206.00364, algorithm 1."""

import dataclasses
from collections.abc import Sequence

from msgspec.structs import replace

from latentforge.runtime.sampling.euler import (
    SIGMA_OPTIONS,
    plan_euler,
    plan_euler_from_timesteps,
)
from latentforge.runtime.sampling.levels import NoisePlan
from latentforge.runtime.sampling.moves import (
    blend,
    clipped,
    ddim_move,
    noise_in,
    noise_move,
)
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule

__all__ = ["HEUN", "plan_heun", "plan_heun_from_timesteps"]

_OPTIONS = SIGMA_OPTIONS | {"clip_sample", "clip_sample_range"}


def plan_heun(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan Euler's levels, but not at zero terminal SNR, which diffusers' Heun does not have."""
    options = schedule.options.followed(_OPTIONS)
    plan = plan_euler(replace(schedule, zero_terminal_snr=False, options=options), steps)
    return dataclasses.replace(plan, options=options)


def plan_heun_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan these timesteps as plan_heun() does."""
    options = schedule.options.followed(_OPTIONS)
    schedule = replace(schedule, zero_terminal_snr=False, options=options)
    plan = plan_euler_from_timesteps(schedule, timesteps)
    return dataclasses.replace(plan, options=options)


def _heun(run: SamplerRun, x: Array) -> Updates:
    """Evaluate the network at both ends of a step; only once in the last step."""
    for interval in run.plan.intervals:
        denoised = clipped(run.denoise(x, interval.start), run.plan.options)
        ahead = ddim_move(x, denoised, interval)
        if interval.end.sigma > 0:
            ahead = run.mask_blend(ahead, interval.end)
            noise = noise_in(x, denoised, interval.start)
            denoised = clipped(run.denoise(ahead, interval.end), run.plan.options)
            mean = blend((1 / 2, noise), (1 / 2, noise_in(ahead, denoised, interval.end)))
            ahead = noise_move(x, mean, interval)
        x = yield ahead, denoised


HEUN = Sampler(
    name="heun",
    summary="second order, two evaluations a step",
    plan=plan_heun,
    plan_from_timesteps=plan_heun_from_timesteps,
    method=_heun,
    diffusers=DiffusersScheduler(name="HeunDiscreteScheduler", follows=_OPTIONS),
)
