"""SDE-DPM-Solver++(2M): Lu et al. (2022), arXiv 2211.01095."""

from latentforge.runtime.sampling.dpmpp_2m import (
    DPM_SCHEDULER,
    KARRAS,
    plan_dpm,
    plan_dpm_from_timesteps,
    plan_dpm_karras,
)
from latentforge.runtime.sampling.moves import renoise_move
from latentforge.runtime.sampling.multistep import Evaluation, midpoint
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)

__all__ = ["DPMPP_2M_SDE", "DPMPP_2M_SDE_KARRAS"]

_SDE = {"algorithm_type": "sde-dpmsolver++"}


def _sde(run: SamplerRun, x: Array) -> Updates:
    """Step as DPM-Solver++(2M) does, with fresh noise in every step."""
    last: Evaluation | None = None
    for interval in run.plan.intervals:
        now = Evaluation(interval.start, run.denoise(x, interval.start))
        x = renoise_move(x, midpoint(now, last, interval), interval, run.noise())
        last = now
        x = yield x, now.denoised


DPMPP_2M_SDE = Sampler(
    name="dpmpp_2m_sde",
    summary="dpmpp_2m, with fresh noise at each step",
    plan=plan_dpm,
    plan_from_timesteps=plan_dpm_from_timesteps,
    method=_sde,
    diffusers=DiffusersScheduler(name=DPM_SCHEDULER, options=_SDE),
)

DPMPP_2M_SDE_KARRAS = Sampler(
    name="dpmpp_2m_sde_karras",
    summary="dpmpp_2m_sde at Karras' levels",
    plan=plan_dpm_karras,
    plan_from_timesteps=None,
    method=_sde,
    diffusers=DiffusersScheduler(name=DPM_SCHEDULER, options={**_SDE, **KARRAS}),
)
