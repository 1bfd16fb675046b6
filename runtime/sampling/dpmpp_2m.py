"""DPM-Solver++(2M): Lu et al. (2022), arXiv 2211.01095, algorithm 2."""

from collections.abc import Callable, Sequence

import numpy as np

from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan, chain
from latentforge.runtime.sampling.moves import ddim_move
from latentforge.runtime.sampling.multistep import Evaluation, midpoint
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import (
    check_steps,
    levels_at,
    levels_of_ratios,
    noise_ratios,
    spaced_timesteps,
    timesteps_of_ratios,
)

__all__ = [
    "DPMPP_2M",
    "DPMPP_2M_KARRAS",
    "DPM_SCHEDULER",
    "KARRAS",
    "Target",
    "multistep",
    "plan_dpm",
    "plan_dpm_from_timesteps",
    "plan_dpm_karras",
]

Target = Callable[[Evaluation, Evaluation | None, NoiseInterval], Array]
"""(present estimate, last estimate, interval) -> clean latent to step towards."""

DPM_SCHEDULER = "DPMSolverMultistepScheduler"
KARRAS = {"use_karras_sigmas": True}

_KARRAS_RHO = 7.0


def plan_dpm(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan whole timesteps, spaced as if the clean latent were one of them."""
    extra = schedule.spacing != "trailing"
    count = check_steps(schedule, steps) + extra
    times = np.round(spaced_timesteps(schedule, count, "linspace"))[:steps]
    return plan_dpm_from_timesteps(schedule, times.tolist())


def plan_dpm_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan these timesteps, down to the clean latent."""
    return NoisePlan(chain(levels_at(schedule, timesteps)))


def plan_dpm_karras(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan sigma / alpha as in Karras et al. (2022), equation 5, over the schedule's range."""
    ratios = noise_ratios(schedule)
    ends = float(ratios[-1]) ** (1 / _KARRAS_RHO), float(ratios[0]) ** (1 / _KARRAS_RHO)
    ramp = np.linspace(0, 1, check_steps(schedule, steps))
    chosen = (ends[0] + ramp * (ends[1] - ends[0])) ** _KARRAS_RHO
    times = timesteps_of_ratios(ratios, chosen)
    # diffusers truncates the timesteps of the cosine schedule, and rounds those of the others.
    whole = np.floor(times) if schedule.beta_kind == "squaredcos_cap_v2" else np.round(times)
    return NoisePlan(chain(levels_of_ratios(chosen, whole)))


def multistep(run: SamplerRun, x: Array, target: Target = midpoint) -> Updates:
    """Step towards a clean latent extrapolated from the last two estimates."""
    last: Evaluation | None = None
    for interval in run.plan.intervals:
        now = Evaluation(interval.start, run.denoise(x, interval.start))
        x = ddim_move(x, target(now, last, interval), interval)
        last = now
        x = yield x, now.denoised


DPMPP_2M = Sampler(
    name="dpmpp_2m",
    summary="DPM-Solver++, second order multistep",
    plan=plan_dpm,
    plan_from_timesteps=plan_dpm_from_timesteps,
    method=multistep,
    diffusers=DiffusersScheduler(name=DPM_SCHEDULER),
)

DPMPP_2M_KARRAS = Sampler(
    name="dpmpp_2m_karras",
    summary="dpmpp_2m at Karras' levels",
    plan=plan_dpm_karras,
    plan_from_timesteps=None,
    method=multistep,
    diffusers=DiffusersScheduler(name=DPM_SCHEDULER, options=KARRAS),
)
