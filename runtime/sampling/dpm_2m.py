"""DPM-Solver(2M), along the noise: Lu et al. (2022), arXiv 2206.00927, and its SDE variant."""

from functools import partial

from msgspec.structs import replace

from latentforge.runtime.sampling.dpmpp_2m import DPM_OPTIONS, DPM_SCHEDULER, plan_dpm
from latentforge.runtime.sampling.levels import NoisePlan
from latentforge.runtime.sampling.multistep import NOISE, NOISE_SDE, multistep
from latentforge.runtime.sampling.sampler import DiffusersScheduler, Sampler
from latentforge.runtime.sampling.schedule import Schedule

__all__ = ["DPM_2M", "DPM_2M_SDE"]


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan as plan_dpm() does, down to the first training timestep: less has no finite step."""
    options = replace(schedule.options, final_sigmas_type="sigma_min")
    return plan_dpm(replace(schedule, options=options), steps)


DPM_2M = Sampler(
    name="dpm_2m",
    summary="DPM-Solver, second order multistep along the noise",
    plan=_plan,
    plan_from_timesteps=None,
    method=partial(multistep, algorithm=NOISE),
    diffusers=DiffusersScheduler(
        name=DPM_SCHEDULER,
        options={"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        follows=DPM_OPTIONS,
    ),
)

DPM_2M_SDE = Sampler(
    name="dpm_2m_sde",
    summary="dpm_2m, with fresh noise at each step",
    plan=_plan,
    plan_from_timesteps=None,
    method=partial(multistep, algorithm=NOISE_SDE),
    diffusers=DiffusersScheduler(
        name=DPM_SCHEDULER,
        options={"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        follows=DPM_OPTIONS,
    ),
)
