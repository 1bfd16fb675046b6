"""DEIS with polynomials in log(sigma / alpha): Zhang & Chen (2023), arXiv 2204.13902."""

import math
from collections.abc import Sequence

from msgspec.structs import replace

from latentforge.runtime.sampling.dpmpp_2m import whole_levels
from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan, chain
from latentforge.runtime.sampling.moves import blend, noise_move
from latentforge.runtime.sampling.multistep import (
    NOISE,
    Evaluation,
    lagrange_basis,
    multistep_orders,
)
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import levels_at

__all__ = ["DEIS"]

_OPTIONS = frozenset(
    "solver_order lower_order_final use_karras_sigmas use_exponential_sigmas use_beta_sigmas "
    "sigma_min sigma_max".split()
)


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan whole timesteps, down to the first training timestep.

    With another spacing of sigma / alpha the last level is repeated instead, so that the last step
    changes nothing, as in diffusers, which has no zero terminal SNR here.
    """
    schedule = replace(schedule.followed(_OPTIONS), zero_terminal_snr=False)
    options = schedule.options
    levels = whole_levels(schedule, steps)
    last = levels[-1] if options.sigma_spacing else levels_at(schedule, [0])[0]
    solver = multistep_orders(len(levels), options, ends_clean=False)
    return NoisePlan(chain(levels, last), solver=solver, options=options)


def _deis(run: SamplerRun, x: Array) -> Updates:
    """Step along the mean of the noises' polynomial over sigma / alpha."""
    history: list[Evaluation] = []
    for interval, solver in zip(run.plan.intervals, run.plan.solver_steps, strict=True):
        denoised = run.denoise(x, interval.start)
        noise = NOISE.output(x, denoised, interval.start)
        history = [Evaluation(interval.start, noise), *history[:2]]
        order = min(solver.order if solver else 2, len(history))
        weights = _weights(history[:order], interval)
        mean = blend(*((w, past.output) for w, past in zip(weights, history, strict=False)))
        x = noise_move(x, mean, interval)
        x = yield x, denoised


def _weights(history: Sequence[Evaluation], interval: NoiseInterval) -> list[float]:
    """Return the mean over the step of each Lagrange polynomial in the log of sigma / alpha.

    With u = log(sigma / alpha) from the start of the step, the integral of u**k over sigma / alpha
    is that of u**k exp(u).
    """
    start, end = interval
    width = start.log_snr - end.log_snr
    if len(history) == 1 or width == 0:
        return [1.0, *(0.0 for _ in history[1:])]
    nodes = [start.log_snr - past.level.log_snr for past in history]
    moments = _moments(width, len(nodes))
    return [float(basis @ moments) / math.expm1(width) for basis in lagrange_basis(nodes)]


def _moments(width: float, count: int) -> list[float]:
    """Return the integrals of u**k exp(u) from 0 to width, for k below count."""
    moments = [math.expm1(width)]
    for k in range(1, count):
        moments.append(width**k * math.exp(width) - k * moments[-1])
    return moments


DEIS = Sampler(
    name="deis",
    summary="second order multistep along the noise (Zhang & Chen 2023)",
    plan=_plan,
    plan_from_timesteps=None,
    method=_deis,
    diffusers=DiffusersScheduler(name="DEISMultistepScheduler", follows=_OPTIONS),
)
