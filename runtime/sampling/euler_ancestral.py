"""Ancestral sampling with Euler steps, which is DDPM's step: Ho et al. (2020)."""

from latentforge.runtime.sampling.euler import plan_euler, plan_euler_from_timesteps
from latentforge.runtime.sampling.moves import renoise_move
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)

__all__ = ["EULER_ANCESTRAL"]


def _ancestral(run: SamplerRun, x: Array) -> Updates:
    """Step below the planned level and add fresh noise up to it."""
    for interval in run.plan.intervals:
        denoised = run.denoise(x, interval.start)
        x = renoise_move(x, denoised, interval, run.noise())
        x = yield x, denoised


EULER_ANCESTRAL = Sampler(
    name="euler_ancestral",
    summary="Euler, with fresh noise at each step",
    plan=plan_euler,
    plan_from_timesteps=plan_euler_from_timesteps,
    method=_ancestral,
    diffusers=DiffusersScheduler(name="EulerAncestralDiscreteScheduler"),
)
