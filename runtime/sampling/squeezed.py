"""DeciDiffusion 2.0's squeezed schedules: the first of 16 steps, then fewer and longer ones."""

import math
from functools import partial

import numpy as np
from msgspec.structs import replace

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.dpmpp_2m import DPM_SCHEDULER, multistep
from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan, chain
from latentforge.runtime.sampling.multistep import Evaluation, extrapolate
from latentforge.runtime.sampling.sampler import Array, DiffusersScheduler, Sampler
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import check_steps, levels_at, noise_ratios

__all__ = ["SQUEEZED_10", "SQUEEZED_11"]

_SQUEEZED_FROM = 16  # number of steps that Deci's modes are made for
_LOG_SNR = -7.5  # training timesteps below it are left out


def _plan(schedule: Schedule, steps: int, *, count: int, kept: int) -> NoisePlan:
    """Plan the first `kept` of `steps` timesteps, then evenly spaced ones.

    Timesteps are plan_dpm()'s in "linspace", without the noisiest training timesteps. There is no
    rescaling to zero terminal SNR, and the last step ends on the first training timestep.

    Args:
        schedule: of the checkpoint.
        steps: number of steps before squeezing.
        count: number of steps after squeezing.
        kept: how many of them are the original ones.

    Raises:
        SettingsError: too few steps to squeeze.
    """
    schedule = replace(schedule, zero_terminal_snr=False)
    total = np.searchsorted(noise_ratios(schedule), math.exp(-_LOG_SNR), side="right")
    planned = np.round(np.linspace(0, total - 1, check_steps(schedule, steps) + 1)[:0:-1])
    stride = planned[kept - 1] // (count - kept + 1) if steps >= kept else 0
    if not stride:
        raise SettingsError(
            f"{steps} steps cannot be squeezed into {count}: use {_SQUEEZED_FROM}, as Deci does"
        )
    times = np.append(planned[:kept], stride * np.arange(count - kept, -1, -1))
    return NoisePlan(chain(levels_at(schedule, times.tolist()))[:-1])


def _mean(now: Evaluation, last: Evaluation | None, interval: NoiseInterval) -> Array:
    """Average the linearly extrapolated clean latent over the interval.

    The weights are those of the exact solution: Lu et al. (2022), arXiv 2211.01095, proposition
    4.1; algorithm 2 takes the value at the midpoint. diffusers has both, and calls this one
    "heun". The step to the first training timestep is first order, as it is there in runs of
    fewer than 15 steps.
    """
    if last is None or interval.end.timestep == 0:
        return now.denoised
    h = interval.end.log_snr - now.level.log_snr
    return extrapolate(now, last, interval, -1 / math.expm1(-h) - 1 / h)


_SCHEDULER = DiffusersScheduler(
    name=DPM_SCHEDULER,
    options={
        "algorithm_type": "dpmsolver++",
        "solver_type": "heun",
        "solver_order": 2,
        "final_sigmas_type": "sigma_min",
        "rescale_betas_zero_snr": False,
    },
    explicit_timesteps=True,
)

SQUEEZED_10 = Sampler(
    name="squeezed_10",
    summary="DeciDiffusion 2.0's: 16 steps squeezed into 10",
    plan=partial(_plan, count=10, kept=6),  # Deci's squeeze mode "10,6"
    plan_from_timesteps=None,
    method=partial(multistep, target=_mean),
    diffusers=_SCHEDULER,
)

SQUEEZED_11 = Sampler(
    name="squeezed_11",
    summary="DeciDiffusion 2.0's: 16 steps squeezed into 11",
    plan=partial(_plan, count=11, kept=7),  # Deci's squeeze mode "11,7"
    plan_from_timesteps=None,
    method=partial(multistep, target=_mean),
    diffusers=_SCHEDULER,
)
