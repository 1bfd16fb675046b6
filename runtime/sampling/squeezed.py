"""DeciDiffusion 2.0's squeezed schedules: the first of 16 steps, then fewer and longer ones."""

import math
from functools import partial

import numpy as np
from msgspec.structs import replace

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.dpmpp_2m import DPM_SCHEDULER
from latentforge.runtime.sampling.levels import NoisePlan, chain
from latentforge.runtime.sampling.multistep import multistep, multistep_orders
from latentforge.runtime.sampling.options import SolverOptions
from latentforge.runtime.sampling.sampler import DiffusersScheduler, Sampler
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import check_steps, levels_at, noise_ratios

__all__ = ["SQUEEZED_10", "SQUEEZED_11"]

_SQUEEZED_FROM = 16  # number of steps that Deci's modes are made for
# Averages the linearly extrapolated clean latent over each step.
_OPTIONS = SolverOptions(solver_order=2, solver_type="heun")
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
    intervals = chain(levels_at(schedule, times.tolist()))[:-1]
    solver = multistep_orders(len(intervals), _OPTIONS, ends_clean=False)
    return NoisePlan(intervals, solver=solver, options=_OPTIONS)


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
    method=multistep,
    diffusers=_SCHEDULER,
)

SQUEEZED_11 = Sampler(
    name="squeezed_11",
    summary="DeciDiffusion 2.0's: 16 steps squeezed into 11",
    plan=partial(_plan, count=11, kept=7),  # Deci's squeeze mode "11,7"
    plan_from_timesteps=None,
    method=multistep,
    diffusers=_SCHEDULER,
)
