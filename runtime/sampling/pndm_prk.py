"""PNDM with Runge-Kutta steps at the start: Liu et al. (2022), arXiv 2202.09778."""

import numpy as np
from msgspec.structs import replace

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan
from latentforge.runtime.sampling.moves import blend, noise_move
from latentforge.runtime.sampling.pndm import ADAMS_BASHFORTH
from latentforge.runtime.sampling.sampler import (
    Array,
    DiffusersScheduler,
    Sampler,
    SamplerRun,
    Updates,
)
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import check_steps, spaced_timesteps

__all__ = ["PNDM_PRK"]

_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_STEPS = 3  # Runge-Kutta steps, of four evaluations each


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan three Runge-Kutta steps, then PNDM's.

    An interval of a Runge-Kutta step starts where the network is evaluated, and ends where the step
    goes from its first level. As in diffusers, there is no zero terminal SNR.

    Raises:
        SettingsError: fewer than four steps.
    """
    if check_steps(schedule, steps) <= _STEPS:
        raise SettingsError(f"{steps} steps: PNDM with Runge-Kutta steps takes at least 4")
    ends_clean = schedule.final_alpha_one is True
    schedule = replace(schedule.followed(()), zero_terminal_snr=False, final_alpha_one=ends_clean)
    stride = schedule.train_steps // steps
    times = np.round(spaced_timesteps(schedule, steps, "leading")).astype(int).tolist()
    halves = [t + part for t in times[: _STEPS + 1] for part in (stride // 2, 0)][1:]
    first = [t for t in halves for _ in range(2)][1:-1]
    pairs = [(t, t if index % 2 else t - stride // 2) for index, t in enumerate(first)]
    pairs += [(t, t - stride) for t in times[_STEPS:]]
    intervals = tuple(NoiseInterval(schedule.at(t), schedule.at(end)) for t, end in pairs)
    return NoisePlan(intervals, runge_kutta=True)


def _pndm_prk(run: SamplerRun, x: Array) -> Updates:
    """Take steps of Runge and Kutta's method, then linear multistep, over the network's outputs."""
    outputs: list[Array] = []
    parts: list[Array] = []
    origin, start = x, run.plan.intervals[0].start
    for index, interval in enumerate(run.plan.intervals):
        denoised = run.denoise(x, interval.start)
        output = run.prediction.output(x, denoised, interval.start)
        if index >= 4 * _STEPS:
            origin, start = x, interval.start
            outputs = [output, *outputs[:3]]
            output = blend(*zip(ADAMS_BASHFORTH[len(outputs) - 1], outputs, strict=True))
        else:
            if index % 4 == 0:
                origin, start, parts = x, interval.start, []
                outputs = [output, *outputs]
            parts.append(output)
            if len(parts) == len(_RUNGE_KUTTA):
                output = blend(*zip(_RUNGE_KUTTA, parts, strict=True))
        noise = run.prediction.noise(origin, output, start)
        x = noise_move(origin, noise, NoiseInterval(start, interval.end))
        x = yield x, denoised


PNDM_PRK = Sampler(
    name="pndm_prk",
    summary="pndm, with three Runge-Kutta steps of four evaluations first",
    plan=_plan,
    plan_from_timesteps=None,
    method=_pndm_prk,
    diffusers=DiffusersScheduler(name="PNDMScheduler", options={"skip_prk_steps": False}),
)
