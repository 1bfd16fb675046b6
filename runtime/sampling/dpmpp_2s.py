"""Singlestep DPM-Solver++ and DPM-Solver: Lu et al. (2022), arXiv 2206.00927 and 2211.01095."""

from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from latentforge.runtime.sampling.dpmpp_2m import whole_levels
from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan, SolverStep, chain
from latentforge.runtime.sampling.moves import blend
from latentforge.runtime.sampling.multistep import (
    DATA,
    DATA_SDE,
    NOISE,
    Algorithm,
    Evaluation,
    first_weight,
    second_weight,
)
from latentforge.runtime.sampling.options import SolverOptions
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import final_level

__all__ = ["DPMPP_2S", "DPMPP_2S_SDE", "DPM_2S"]


_SCHEDULER = "DPMSolverSinglestepScheduler"
_OPTIONS = frozenset(
    "solver_order solver_type lower_order_final use_karras_sigmas use_exponential_sigmas "
    "use_beta_sigmas sigma_min sigma_max final_sigmas_type lambda_min_clipped".split()
)


def _plan(schedule: Schedule, steps: int, *, ends_clean: bool = True) -> NoisePlan:
    """Plan evenly spaced whole timesteps, whatever the spacing of the schedule, in small groups.

    diffusers' singlestep scheduler has neither spacings nor zero terminal SNR.
    """
    options = schedule.options.followed(_OPTIONS)
    if not ends_clean:
        options = replace(options, final_sigmas_type="sigma_min")
    schedule = replace(schedule, options=options, spacing="linspace", zero_terminal_snr=False)
    levels, last = whole_levels(schedule, steps), final_level(schedule)
    orders = _orders(len(levels), options, ends_clean=last.sigma == 0)
    solver = tuple(SolverStep(order=order) for order in orders)
    return NoisePlan(chain(levels, last), solver=solver, options=options)


def _orders(count: int, options: SolverOptions, *, ends_clean: bool) -> list[int]:
    """Return the order of each step: groups that count up to the solver's order.

    The last group is shorter where the number of steps needs it, or the final level does.
    """
    order = options.solver_order or 2
    group = list(range(1, order + 1))
    if not (options.lower_order_final or ends_clean or count % order):
        return group * (count // order)
    rest = count % order or order
    orders = group * ((count - rest) // order) + group[: min(rest, order - 1)]
    orders += [1] * (count - len(orders))
    return [*orders[:-1], 1] if ends_clean else orders


def _singlestep(run: SamplerRun, x: Array, algorithm: Algorithm) -> Updates:
    """Step from the first level of a group, along an output interpolated within the group."""
    history: list[Evaluation] = []
    heun = run.plan.options.solver_type == "heun"
    origin = x
    for interval, solver in zip(run.plan.intervals, run.plan.solver_steps, strict=True):
        denoised = run.denoise(x, interval.start)
        output = algorithm.output(x, denoised, interval.start)
        history = [Evaluation(interval.start, output), *history[:2]]
        order = min(solver.order if solver else 2, len(history))
        origin = x if order == 1 else origin
        step = NoiseInterval(history[order - 1].level, interval.end)
        target = _interpolate(history[:order], step, algorithm, heun=heun)
        x = algorithm.move(origin, target, step, run.noise)
        x = yield x, denoised


def _interpolate(
    history: Sequence[Evaluation], step: NoiseInterval, algorithm: Algorithm, *, heun: bool
) -> Array:
    """Interpolate an output over a step that starts at the earliest evaluation."""
    first, h = history[-1], step.end.log_snr - step.start.log_snr
    if len(history) == 1 or h == 0:
        return history[0].output
    size = algorithm.step_size(step)
    ratios = [(now.level.log_snr - first.level.log_snr) / h for now in history[:-1]]
    weights = _weights(ratios, size, algorithm, heun=heun)
    return blend(
        (1 - sum(weights), first.output),
        *((w, now.output) for w, now in zip(weights, history, strict=False)),
    )


def _weights(
    ratios: Sequence[float], size: float, algorithm: Algorithm, *, heun: bool
) -> tuple[float, ...]:
    """Return the weights of the differences from the earliest evaluation, latest first."""
    if len(ratios) == 1:
        return ((first_weight(size) if heun else 1 / 2) / ratios[0],)
    late, early = ratios
    if not heun:
        return first_weight(size) / late, 0.0
    slope, bend = first_weight(size), 2 * second_weight(size, stochastic=algorithm.stochastic)
    # D1 = (late * d_early - early * d_late) / (late - early), D2 = 2 (d_late - d_early) / (...).
    return (
        (bend - slope * early) / (late - early) / late,
        (slope * late - bend) / (late - early) / early,
    )


DPMPP_2S = Sampler(
    name="dpmpp_2s",
    summary="DPM-Solver++, second order singlestep",
    plan=_plan,
    plan_from_timesteps=None,
    method=partial(_singlestep, algorithm=DATA),
    diffusers=DiffusersScheduler(
        name=_SCHEDULER, options={"algorithm_type": "dpmsolver++"}, follows=_OPTIONS
    ),
)

DPMPP_2S_SDE = Sampler(
    name="dpmpp_2s_sde",
    summary="dpmpp_2s, with fresh noise at each step",
    plan=_plan,
    plan_from_timesteps=None,
    method=partial(_singlestep, algorithm=DATA_SDE),
    diffusers=DiffusersScheduler(
        name=_SCHEDULER, options={"algorithm_type": "sde-dpmsolver++"}, follows=_OPTIONS
    ),
)

DPM_2S = Sampler(
    name="dpm_2s",
    summary="DPM-Solver, second order singlestep along the noise",
    plan=partial(_plan, ends_clean=False),
    plan_from_timesteps=None,
    method=partial(_singlestep, algorithm=NOISE),
    diffusers=DiffusersScheduler(
        name=_SCHEDULER,
        options={"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        follows=_OPTIONS,
    ),
)
