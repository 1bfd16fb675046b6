"""Ancestral sampling with steps of DPM-Solver-2, as in k-diffusion."""

import math

import numpy as np

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.euler import SIGMA_OPTIONS
from latentforge.runtime.sampling.kdpm2 import plan_with_middles
from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan
from latentforge.runtime.sampling.moves import blend, ddim_move, noise_in
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule

__all__ = ["KDPM2_ANCESTRAL"]

_LONGEST = 40  # largest ratio of sigma / alpha in a step


def _below(start: float, end: float) -> float:
    """Return the value of sigma / alpha below the end, from which fresh noise leads up to it.

    It is end**2 / start. diffusers takes differences of squares in float32, of which little is left
    in a long step, and images depend on what it gets.
    """
    before, after = np.float32(start) ** 2, np.float32(end) ** 2
    added = np.sqrt(after * (before - after) / before)
    return float(np.sqrt(max(after - added**2, np.float32(0)))) or end * end / start


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan KDPM2's levels, with the middle of a step halfway to where fresh noise starts.

    Raises:
        SettingsError: a step is too long for _below() in float32.
    """
    plan = plan_with_middles(schedule, steps, _below)
    for start, end in plan.intervals[:-1]:
        if start.sigma * end.alpha > _LONGEST * end.sigma * start.alpha:
            raise SettingsError(
                f"{steps} steps: the one from timestep {start.timestep:g} to {end.timestep:g} is "
                "too long for kdpm2_ancestral: use more, or kdpm2"
            )
    return plan


def _kdpm2_ancestral(run: SamplerRun, x: Array) -> Updates:
    """Step below the planned level, along the noise in the middle, and add fresh noise up to it."""
    for interval, solver in zip(run.plan.intervals, run.plan.solver_steps, strict=True):
        denoised = run.denoise(x, interval.start)
        if solver is None or solver.middle is None:
            x = yield ddim_move(x, denoised, interval), denoised
            continue
        halfway = ddim_move(x, denoised, NoiseInterval(interval.start, solver.middle))
        halfway = run.mask_blend(halfway, solver.middle)
        denoised = run.denoise(halfway, solver.middle)
        noise = noise_in(halfway, denoised, solver.middle)
        x = yield _renoised(x, noise, interval, run.noise()), denoised


def _renoised(x: Array, noise: Array, interval: NoiseInterval, fresh: Array) -> Array:
    start, end = interval
    before, after = start.sigma / start.alpha, end.sigma / end.alpha
    below = _below(before, after)
    added = after * math.sqrt(1 - (after / before) ** 2)
    scaled = (end.alpha / start.alpha, x), (end.alpha * (below - before), noise)
    return blend(*scaled, (end.alpha * added, fresh))


KDPM2_ANCESTRAL = Sampler(
    name="kdpm2_ancestral",
    summary="kdpm2, with fresh noise at each step",
    plan=_plan,
    plan_from_timesteps=None,
    method=_kdpm2_ancestral,
    diffusers=DiffusersScheduler(name="KDPM2AncestralDiscreteScheduler", follows=SIGMA_OPTIONS),
)
