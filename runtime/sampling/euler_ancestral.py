"""Ancestral sampling with Euler steps, which is DDPM's step: Ho et al. (2020)."""

from collections.abc import Sequence

from latentforge.runtime.sampling.euler import plan_euler, plan_euler_from_timesteps
from latentforge.runtime.sampling.levels import NoisePlan
from latentforge.runtime.sampling.moves import renoise_move
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule

__all__ = ["EULER_ANCESTRAL"]


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    return plan_euler(schedule.followed(()), steps)


def _plan_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    return plan_euler_from_timesteps(schedule.followed(()), timesteps)


def _ancestral(run: SamplerRun, x: Array) -> Updates:
    """Step below the planned level and add fresh noise up to it."""
    for interval in run.plan.intervals:
        denoised = run.denoise(x, interval.start)
        x = renoise_move(x, denoised, interval, run.noise())
        x = yield x, denoised


EULER_ANCESTRAL = Sampler(
    name="euler_ancestral",
    summary="Euler, with fresh noise at each step",
    plan=_plan,
    plan_from_timesteps=_plan_from_timesteps,
    method=_ancestral,
    diffusers=DiffusersScheduler(name="EulerAncestralDiscreteScheduler"),
)
