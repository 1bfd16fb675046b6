"""DPM-Solver++(2M): Lu et al. (2022), arXiv 2211.01095, algorithm 2, and its order three."""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from latentforge.runtime.sampling.levels import NoiseLevel, NoisePlan, chain
from latentforge.runtime.sampling.multistep import multistep, multistep_orders
from latentforge.runtime.sampling.options import SigmaSpacing
from latentforge.runtime.sampling.sampler import DiffusersScheduler, Sampler
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import (
    Rounding,
    check_steps,
    final_level,
    levels_at,
    noise_ratios,
    respaced_levels,
    spaced_timesteps,
)

__all__ = [
    "DPMPP_2M",
    "DPMPP_2M_KARRAS",
    "DPM_OPTIONS",
    "DPM_SCHEDULER",
    "KARRAS",
    "plan_dpm",
    "plan_dpm_from_timesteps",
    "plan_dpm_karras",
    "rounded",
    "whole_levels",
]

DPM_SCHEDULER = "DPMSolverMultistepScheduler"

DPM_OPTIONS = frozenset(
    "solver_order solver_type lower_order_final euler_at_final use_karras_sigmas "
    "use_exponential_sigmas use_beta_sigmas use_lu_lambdas sigma_min sigma_max final_sigmas_type "
    "lambda_min_clipped".split()
)
"""Options of DPMSolverMultistepScheduler that its samplers follow."""


def rounded(times: NDArray[np.float64], spacing: SigmaSpacing) -> NDArray[np.float64]:
    """Round the timesteps of Karras' levels and truncate those of others, as diffusers does."""
    return np.round(times) if spacing in ("karras", "lu") else np.trunc(times)


def whole_levels(schedule: Schedule, steps: int, rounding: Rounding = rounded) -> list[NoiseLevel]:
    """Return levels at whole timesteps, spaced as if the clean latent were one of them.

    They are at the spacing of sigma / alpha that the schedule's options name, if they name one.
    """
    check_steps(schedule, steps)
    if schedule.options.sigma_spacing:
        return respaced_levels(schedule, steps, noise_ratios(schedule)[::-1], rounding)
    extra = schedule.spacing != "trailing"
    times = spaced_timesteps(schedule, steps + extra, "linspace", _clipped(schedule))
    return levels_at(schedule, np.round(times)[:steps].tolist())


def _clipped(schedule: Schedule) -> int:
    """Return the number of the noisiest training timesteps that lambda_min_clipped leaves out."""
    limit = schedule.options.lambda_min_clipped
    if limit is None:
        return 0
    return int(np.searchsorted(-np.log(noise_ratios(schedule))[::-1], limit))


def plan_dpm(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan whole timesteps, down to the final level that the options name."""

    def rounding(times: NDArray[np.float64], spacing: SigmaSpacing) -> NDArray[np.float64]:
        # diffusers truncates the timesteps of the cosine schedule.
        cosine = schedule.beta_kind == "squaredcos_cap_v2"
        return np.trunc(times) if cosine else rounded(times, spacing)

    return _plan(schedule, whole_levels(schedule, steps, rounding))


def plan_dpm_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan these timesteps, down to the final level that the options name."""
    return _plan(schedule, levels_at(schedule, timesteps))


def _plan(schedule: Schedule, levels: list[NoiseLevel]) -> NoisePlan:
    last = final_level(schedule)
    orders = multistep_orders(len(levels), schedule.options, ends_clean=last.sigma == 0)
    return NoisePlan(chain(levels, last), solver=orders, options=schedule.options)


def plan_dpm_karras(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan sigma / alpha as in Karras et al. (2022), equation 5, over the schedule's range."""
    options = replace(schedule.options, sigma_spacing="karras")
    return plan_dpm(replace(schedule, options=options), steps)


_DATA = {"algorithm_type": "dpmsolver++"}
KARRAS = {
    "use_karras_sigmas": True,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}

DPMPP_2M = Sampler(
    name="dpmpp_2m",
    summary="DPM-Solver++, second order multistep",
    plan=plan_dpm,
    plan_from_timesteps=plan_dpm_from_timesteps,
    method=multistep,
    diffusers=DiffusersScheduler(name=DPM_SCHEDULER, options=_DATA, follows=DPM_OPTIONS),
)

DPMPP_2M_KARRAS = Sampler(
    name="dpmpp_2m_karras",
    summary="dpmpp_2m at Karras' levels",
    plan=plan_dpm_karras,
    plan_from_timesteps=None,
    method=multistep,
    diffusers=DiffusersScheduler(
        name=DPM_SCHEDULER, options={**_DATA, **KARRAS}, follows=DPM_OPTIONS
    ),
)
