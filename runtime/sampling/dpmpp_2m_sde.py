"""SDE-DPM-Solver++(2M): Lu et al. (2022), arXiv 2211.01095."""

from functools import partial

from latentforge.runtime.sampling.dpmpp_2m import (
    DPM_OPTIONS,
    DPM_SCHEDULER,
    KARRAS,
    plan_dpm,
    plan_dpm_from_timesteps,
    plan_dpm_karras,
)
from latentforge.runtime.sampling.multistep import DATA_SDE, multistep
from latentforge.runtime.sampling.sampler import DiffusersScheduler, Sampler

__all__ = ["DPMPP_2M_SDE", "DPMPP_2M_SDE_KARRAS"]

_SDE = {"algorithm_type": "sde-dpmsolver++"}

DPMPP_2M_SDE = Sampler(
    name="dpmpp_2m_sde",
    summary="dpmpp_2m, with fresh noise at each step",
    plan=plan_dpm,
    plan_from_timesteps=plan_dpm_from_timesteps,
    method=partial(multistep, algorithm=DATA_SDE),
    diffusers=DiffusersScheduler(name=DPM_SCHEDULER, options=_SDE, follows=DPM_OPTIONS),
)

DPMPP_2M_SDE_KARRAS = Sampler(
    name="dpmpp_2m_sde_karras",
    summary="dpmpp_2m_sde at Karras' levels",
    plan=plan_dpm_karras,
    plan_from_timesteps=None,
    method=partial(multistep, algorithm=DATA_SDE),
    diffusers=DiffusersScheduler(
        name=DPM_SCHEDULER, options={**_SDE, **KARRAS}, follows=DPM_OPTIONS
    ),
)
