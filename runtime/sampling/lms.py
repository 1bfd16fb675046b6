"""Linear multistep in sigma / alpha (LMS), as in k-diffusion: Adams-Bashforth of order four."""

from msgspec.structs import replace
from numpy.polynomial import polynomial

from latentforge.runtime.sampling.euler import SIGMA_OPTIONS, sigma_levels, start_scale
from latentforge.runtime.sampling.levels import NoisePlan, SolverStep, chain
from latentforge.runtime.sampling.moves import blend, noise_in, noise_move
from latentforge.runtime.sampling.multistep import lagrange_basis
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule

__all__ = ["LMS"]

_ORDER = 4


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan Euler's levels, but not at zero terminal SNR, which diffusers' LMS does not have."""
    schedule = replace(schedule.followed(SIGMA_OPTIONS), zero_terminal_snr=False)
    levels = sigma_levels(schedule, steps)
    ratios = [*(level.sigma / level.alpha for level in levels), 0.0]
    solver = tuple(SolverStep(weights=_weights(ratios, index)) for index in range(len(levels)))
    return NoisePlan(chain(levels), start_scale(schedule, levels[0]), solver=solver)


def _weights(ratios: list[float], index: int) -> tuple[float, ...]:
    """Return the weights of the last noises in a step, latest first.

    Each is the mean over the step of a Lagrange polynomial in sigma / alpha.
    """
    start, end = ratios[index : index + 2]
    nodes = [ratio - start for ratio in ratios[max(0, index - _ORDER + 1) : index + 1][::-1]]
    means = (
        polynomial.polyval(end - start, polynomial.polyint(basis)) / (end - start)
        for basis in lagrange_basis(nodes)
    )
    return tuple(map(float, means))


def _lms(run: SamplerRun, x: Array) -> Updates:
    """Step along a weighted sum of the last noises.

    A run that starts late has fewer noises than weights at first. As in diffusers, the weights then
    remain those of the complete run.
    """
    noises: list[Array] = []
    for interval, solver in zip(run.plan.intervals, run.plan.solver_steps, strict=True):
        denoised = run.denoise(x, interval.start)
        noises = [noise_in(x, denoised, interval.start), *noises[: _ORDER - 1]]
        weights = solver.weights if solver else (1.0,)
        mean = blend(*zip(weights, noises, strict=False))
        x = noise_move(x, mean, interval)
        x = yield x, denoised


LMS = Sampler(
    name="lms",
    summary="linear multistep of order four in sigma",
    plan=_plan,
    plan_from_timesteps=None,
    method=_lms,
    diffusers=DiffusersScheduler(name="LMSDiscreteScheduler", follows=SIGMA_OPTIONS),
)
