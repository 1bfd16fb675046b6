"""Euler's method and DPM-Solver++ on an EDM schedule: Karras et al. (2022), arXiv 2206.00364."""

import math
from functools import partial

import numpy as np

from latentforge.runtime.sampling.ddim import first_order
from latentforge.runtime.sampling.euler import unscaled
from latentforge.runtime.sampling.levels import CLEAN, NoiseLevel, NoisePlan, chain
from latentforge.runtime.sampling.multistep import DATA, DATA_SDE, multistep, multistep_orders
from latentforge.runtime.sampling.sampler import DiffusersScheduler, Sampler
from latentforge.runtime.sampling.schedule import EDMSchedule
from latentforge.runtime.sampling.spacing import check_steps

__all__ = ["EDM_DPMPP_2M", "EDM_DPMPP_2M_SDE", "EDM_EULER"]


def _levels(schedule: EDMSchedule, steps: int) -> list[NoiseLevel]:
    """Return levels at the spacing of sigma that the schedule names."""
    ramp = np.linspace(0, 1, check_steps(schedule, steps))
    low, high = schedule.sigma_min, schedule.sigma_max
    if schedule.sigma_schedule == "karras":
        ends = high ** (1 / schedule.rho), low ** (1 / schedule.rho)
        sigmas = (ends[0] + ramp * (ends[1] - ends[0])) ** schedule.rho
    else:
        sigmas = np.exp(np.linspace(math.log(low), math.log(high), steps)[::-1])
    return [schedule.level(sigma) for sigma in sigmas.tolist()]


def _last(schedule: EDMSchedule, sigma: float) -> NoiseLevel:
    clean = schedule.options.final_sigmas_type == "zero"
    return CLEAN if clean else unscaled(schedule.level(sigma))


def _scale(schedule: EDMSchedule, first: NoiseLevel) -> float:
    return math.hypot(schedule.sigma_max, 1) * first.alpha


def _plan_euler(schedule: EDMSchedule, steps: int) -> NoisePlan:
    """Plan levels of EDM, down to the clean latent or with the last level twice."""
    levels = _levels(schedule, steps)
    last = _last(schedule, levels[-1].sigma / levels[-1].alpha)
    return NoisePlan(chain(levels, last), _scale(schedule, levels[0]))


def _plan_dpm(schedule: EDMSchedule, steps: int) -> NoisePlan:
    """Plan levels of EDM, down to the clean latent or to the lowest noise."""
    levels, options = _levels(schedule, steps), schedule.options
    last = _last(schedule, schedule.sigma_min)
    orders = multistep_orders(len(levels), options, ends_clean=last.sigma == 0)
    scale = _scale(schedule, levels[0])
    return NoisePlan(chain(levels, last), scale, solver=orders, options=options)


_SCHEDULER = "EDMDPMSolverMultistepScheduler"
_FINAL = frozenset({"final_sigmas_type"})
_OPTIONS = _FINAL | {"solver_order", "solver_type", "lower_order_final", "euler_at_final"}

EDM_EULER = Sampler(
    name="edm_euler",
    summary="first order, for models of an EDM schedule",
    plan=_plan_euler,
    plan_from_timesteps=None,
    method=first_order,
    diffusers=DiffusersScheduler(name="EDMEulerScheduler", follows=_FINAL),
    schedule=EDMSchedule,
)

EDM_DPMPP_2M = Sampler(
    name="edm_dpmpp_2m",
    summary="dpmpp_2m, for models of an EDM schedule",
    plan=_plan_dpm,
    plan_from_timesteps=None,
    method=partial(multistep, algorithm=DATA),
    diffusers=DiffusersScheduler(
        name=_SCHEDULER, options={"algorithm_type": "dpmsolver++"}, follows=_OPTIONS
    ),
    schedule=EDMSchedule,
)

EDM_DPMPP_2M_SDE = Sampler(
    name="edm_dpmpp_2m_sde",
    summary="dpmpp_2m_sde, for models of an EDM schedule",
    plan=_plan_dpm,
    plan_from_timesteps=None,
    method=partial(multistep, algorithm=DATA_SDE),
    diffusers=DiffusersScheduler(
        name=_SCHEDULER, options={"algorithm_type": "sde-dpmsolver++"}, follows=_OPTIONS
    ),
    schedule=EDMSchedule,
)
