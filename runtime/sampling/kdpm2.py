"""DPM-Solver-2 in sigma / alpha, as in k-diffusion: Karras et al. (2022), arXiv 2206.00364."""

import math
from collections.abc import Callable

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from latentforge.runtime.sampling.euler import SIGMA_OPTIONS, sigma_levels, start_scale
from latentforge.runtime.sampling.levels import (
    NoiseInterval,
    NoisePlan,
    SolverStep,
    chain,
)
from latentforge.runtime.sampling.moves import ddim_move, noise_in, noise_move
from latentforge.runtime.sampling.options import SigmaSpacing
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import (
    levels_of_ratios,
    noise_ratios,
    timesteps_of_ratios,
)

__all__ = ["KDPM2", "plan_with_middles"]


def plan_with_middles(
    schedule: Schedule, steps: int, target: Callable[[float, float], float]
) -> NoisePlan:
    """Plan Euler's levels, and the level halfway in each step but the last.

    diffusers' KDPM2 has no zero terminal SNR.

    Args:
        schedule: of the checkpoint.
        steps: number of steps.
        target: (start, end) -> value of sigma / alpha that a step goes to; the middle is halfway
            to it in the logarithm.
    """
    schedule = replace(schedule.followed(SIGMA_OPTIONS), zero_terminal_snr=False)
    levels = sigma_levels(schedule, steps, _rounded)
    ratios = [level.sigma / level.alpha for level in levels]
    middles = np.array(
        [math.sqrt(r * target(r, after)) for r, after in zip(ratios, ratios[1:], strict=False)]
    )
    times = timesteps_of_ratios(noise_ratios(schedule), middles)
    solver = [SolverStep(middle=level) for level in levels_of_ratios(middles, times)]
    scale = start_scale(schedule, levels[0])
    return NoisePlan(chain(levels), scale, solver=(*solver, SolverStep()))


def _rounded(times: NDArray[np.float64], spacing: SigmaSpacing) -> NDArray[np.float64]:
    return np.round(times) if spacing == "karras" else times


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    return plan_with_middles(schedule, steps, lambda start, end: end)


def _kdpm2(run: SamplerRun, x: Array) -> Updates:
    """Step along the noise in the middle of the step; along that at its start in the last one."""
    for interval, solver in zip(run.plan.intervals, run.plan.solver_steps, strict=True):
        denoised = run.denoise(x, interval.start)
        ahead = ddim_move(x, denoised, interval)
        if solver and solver.middle:
            middle = solver.middle
            halfway = ddim_move(x, denoised, NoiseInterval(interval.start, middle))
            halfway = run.mask_blend(halfway, middle)
            denoised = run.denoise(halfway, middle)
            ahead = noise_move(x, noise_in(halfway, denoised, middle), interval)
        x = yield ahead, denoised


KDPM2 = Sampler(
    name="kdpm2",
    summary="DPM-Solver-2, two evaluations a step",
    plan=_plan,
    plan_from_timesteps=None,
    method=_kdpm2,
    diffusers=DiffusersScheduler(name="KDPM2DiscreteScheduler", follows=SIGMA_OPTIONS),
)
