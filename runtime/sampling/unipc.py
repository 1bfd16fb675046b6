"""UniPC with B1(h) or B2(h): Zhao et al. (2023), arXiv 2302.04867."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.sampling.dpmpp_2m import whole_levels
from latentforge.runtime.sampling.levels import (
    NoiseInterval,
    NoiseLevel,
    NoisePlan,
    SolverStep,
    chain,
)
from latentforge.runtime.sampling.moves import blend
from latentforge.runtime.sampling.multistep import DATA, NOISE, Algorithm, Evaluation
from latentforge.runtime.sampling.options import SolverOptions
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import final_level, levels_at

__all__ = ["UNIPC"]

_OPTIONS = frozenset(
    "solver_order solver_type lower_order_final predict_x0 disable_corrector use_karras_sigmas "
    "use_exponential_sigmas use_beta_sigmas sigma_min sigma_max final_sigmas_type".split()
)


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan whole timesteps, down to the final level that the options name.

    If that is not clean, another spacing of sigma / alpha repeats its last level, as in diffusers.
    """
    schedule = schedule.followed(_OPTIONS)
    levels, last = whole_levels(schedule, steps), final_level(schedule)
    if schedule.options.sigma_spacing and last.sigma:
        last = levels[-1]
    return _with_orders(levels, last, schedule.options)


def _plan_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan these timesteps, down to the final level that the options name."""
    schedule = schedule.followed(_OPTIONS)
    return _with_orders(levels_at(schedule, timesteps), final_level(schedule), schedule.options)


def _with_orders(levels: list[NoiseLevel], last: NoiseLevel, options: SolverOptions) -> NoisePlan:
    order, count = options.solver_order or 2, len(levels)
    lowered = options.lower_order_final is not False
    solver = tuple(
        SolverStep(
            order=min(order, count - index) if lowered else order,
            correct=index - 1 not in options.disable_corrector,
        )
        for index in range(count)
    )
    return NoisePlan(chain(levels, last), solver=solver, options=options)


def _unipc(run: SamplerRun, x: Array) -> Updates:
    """Correct each step by the evaluation at its end, then predict the next step.

    The corrector raises the order by one.
    """
    options = run.plan.options
    algorithm = DATA if options.predict_x0 else NOISE
    history: list[Evaluation] = []
    origin, order = x, 1
    for interval, solver in zip(run.plan.intervals, run.plan.solver_steps, strict=True):
        denoised = run.denoise(x, interval.start)
        now = Evaluation(interval.start, algorithm.output(x, denoised, interval.start))
        if history and (solver is None or solver.correct):
            step = NoiseInterval(history[0].level, now.level)
            target = _corrected(now, history[:order], step, algorithm, options)
            x = algorithm.move(origin, target, step, run.noise)
        history = [now, *history[:2]]
        order = min(solver.order if solver else 2, len(history))
        origin = x
        target = _predicted(history[:order], interval, algorithm, options)
        x = algorithm.move(x, target, interval, run.noise)
        x = yield x, denoised


def _predicted(
    history: Sequence[Evaluation],
    step: NoiseInterval,
    algorithm: Algorithm,
    options: SolverOptions,
) -> Array:
    """Return the output to step along by UniP: weights of the differences from the present one."""
    h = step.end.log_snr - step.start.log_snr
    if len(history) == 1 or h == 0 or math.isinf(h):
        return history[0].output
    ratios, size = _ratios(history, h), algorithm.step_size(step)
    if len(history) == 2:
        weights = np.array([1 / 2])
    else:
        weights = np.linalg.solve(_powers(ratios), _moments(size, len(ratios), options))
    return _sum(history, weights / ratios * _base(size, options) / math.expm1(size))


def _corrected(
    now: Evaluation,
    history: Sequence[Evaluation],
    step: NoiseInterval,
    algorithm: Algorithm,
    options: SolverOptions,
) -> Array:
    """Return the output to step along again by UniC, with the one at the end of the step."""
    h = step.end.log_snr - step.start.log_snr
    ratios, size = np.append(_ratios(history, h), 1.0), algorithm.step_size(step)
    if len(history) == 1:
        weights = np.array([1 / 2])
    else:
        weights = np.linalg.solve(_powers(ratios), _moments(size, len(ratios), options))
    scaled = weights / ratios * _base(size, options) / math.expm1(size)
    return _sum([*history, now], scaled)


def _ratios(history: Sequence[Evaluation], h: float) -> NDArray[np.float64]:
    """Return where the past evaluations lie: in steps from the latest one."""
    latest = history[0].level.log_snr
    return np.array([(past.level.log_snr - latest) / h for past in history[1:]])


def _powers(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.vander(ratios, increasing=True).T


def _moments(size: float, count: int, options: SolverOptions) -> NDArray[np.float64]:
    """Return the right-hand side of the order conditions: k! phi_(k+1)(size) size / B(size)."""
    phi, factorial, moments = math.expm1(size) / size - 1, 1, []
    for k in range(1, count + 1):
        moments.append(phi * factorial / _base(size, options))
        factorial *= k + 1
        phi = phi / size - 1 / factorial
    return np.array(moments)


def _base(size: float, options: SolverOptions) -> float:
    """Return B1(h) = h or B2(h) = exp(h) - 1."""
    return size if options.solver_type == "bh1" else math.expm1(size)


def _sum(history: Sequence[Evaluation], weights: NDArray[np.float64]) -> Array:
    """Return the first output plus weighted differences of the others from it."""
    first, *others = history
    terms = ((float(w), other.output) for w, other in zip(weights, others, strict=True))
    return blend((1 - float(weights.sum()), first.output), *terms)


UNIPC = Sampler(
    name="unipc",
    summary="UniPC, second order predictor and corrector (Zhao et al. 2023)",
    plan=_plan,
    plan_from_timesteps=_plan_from_timesteps,
    method=_unipc,
    diffusers=DiffusersScheduler(name="UniPCMultistepScheduler", follows=_OPTIONS),
)
