"""Timesteps that samplers visit, and the noise levels at them.

Lin et al. (2023, arXiv 2305.08891, table 2) name three spacings of timesteps. The diffusers
schedulers, which this follows to the last rounding, read each in their own way.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.levels import CLEAN, NoiseLevel
from latentforge.runtime.sampling.options import SigmaSpacing
from latentforge.runtime.sampling.schedule import EDMSchedule, Schedule, Spacing
from latentforge.runtime.sampling.sigmas import respaced

__all__ = [
    "Rounding",
    "check_steps",
    "final_level",
    "level_at",
    "levels_at",
    "levels_of_ratios",
    "noise_ratios",
    "respaced_levels",
    "spaced_timesteps",
    "timesteps_of_ratios",
    "unrounded",
]

Rounding = Callable[[NDArray[np.float64], SigmaSpacing], NDArray[np.float64]]
"""(timesteps, spacing) -> timesteps as the diffusers scheduler of a sampler rounds them."""

_NEARLY_ZERO = 2.0**-24  # replaces alpha**2 = 0 where a sampler works with sigma / alpha


def unrounded(times: NDArray[np.float64], _: SigmaSpacing) -> NDArray[np.float64]:
    """Return the timesteps as they are."""
    return times


def check_steps(schedule: Schedule | EDMSchedule, steps: int) -> int:
    """Return the number of steps if the schedule has that many.

    Raises:
        SettingsError: it is below 1, or above the number of training timesteps.
    """
    if not 1 <= steps <= schedule.train_steps:
        raise SettingsError(f"{steps} steps: choose between 1 and {schedule.train_steps}")
    return steps


def spaced_timesteps(
    schedule: Schedule, count: int, default: Spacing, clipped: int = 0
) -> NDArray[np.float64]:
    """Return decreasing timesteps in one of the three spacings, of shape (count,).

    Args:
        schedule: names the spacing.
        count: number of timesteps.
        default: the sampler's own spacing, for a schedule that names none.
        clipped: number of the noisiest training timesteps to leave out.
    """
    total = schedule.train_steps - clipped
    match schedule.spacing or default:
        case "leading":
            return np.arange(float(count))[::-1] * (total // count) + schedule.offset
        case "trailing":
            return np.round(np.arange(total, 0.0, -schedule.train_steps / count)[:count]) - 1
        case "linspace":
            return np.linspace(0, total - 1, count)[::-1]


def noise_ratios(schedule: Schedule) -> NDArray[np.float32]:
    """Return sigma / alpha at each training timestep, kept finite at zero terminal SNR."""
    square = schedule.alphas_cumprod.copy()
    if schedule.zero_terminal_snr:
        square[-1] = _NEARLY_ZERO
    ratios: NDArray[np.float32] = np.sqrt((np.float32(1) - square) / square)
    return ratios


def timesteps_of_ratios(
    ratios: NDArray[np.float32], chosen: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the fractional timesteps of values of sigma / alpha, interpolated in the logarithm.

    Args:
        ratios: sigma / alpha at each training timestep, increasing.
        chosen: values to look up.
    """
    logs, target = np.log(ratios), np.log(chosen)
    below = np.clip(np.searchsorted(logs, target, side="right") - 1, 0, len(logs) - 2)
    weight = np.clip((logs[below] - target) / (logs[below] - logs[below + 1]), 0, 1)
    return np.asarray((1 - weight) * below + weight * (below + 1), np.float64)


def respaced_levels(
    schedule: Schedule, count: int, ends: NDArray[np.floating], rounding: Rounding
) -> list[NoiseLevel]:
    """Return levels at the spacing of sigma / alpha that the schedule's options name.

    Args:
        schedule: names the spacing, and may name its ends.
        count: number of levels.
        ends: values of sigma / alpha of which the first and the last are used, where the schedule
            names none.
        rounding: rounds the timesteps of the levels.
    """
    options, spacing = schedule.options, schedule.options.sigma_spacing or "karras"
    high, low = float(ends[0]), float(ends[-1])
    if spacing != "lu":  # which has no such options in diffusers
        high, low = options.sigma_max or high, options.sigma_min or low
    chosen = respaced(spacing, high, low, count)
    times = timesteps_of_ratios(noise_ratios(schedule), chosen)
    return levels_of_ratios(chosen, rounding(times, spacing))


def final_level(schedule: Schedule) -> NoiseLevel:
    """Return the level on which a sampler ends that reads final_sigmas_type."""
    if schedule.options.final_sigmas_type == "zero":
        return CLEAN
    return levels_at(schedule, [0])[0]


def level_at(schedule: Schedule, timestep: float) -> NoiseLevel:
    """Return the level at a timestep; sigma / alpha is linear between whole ones."""
    whole = timestep == int(timestep)
    return schedule.at(timestep) if whole else levels_at(schedule, [timestep])[0]


def levels_at(schedule: Schedule, timesteps: Sequence[float]) -> list[NoiseLevel]:
    """Return the levels at timesteps; sigma / alpha is linear between whole ones."""
    times = np.array(timesteps, np.float64)
    table = noise_ratios(schedule)
    ratios = np.asarray(np.interp(times, np.arange(len(table)), table), np.float64)
    return levels_of_ratios(ratios, times)


def levels_of_ratios(ratios: NDArray[np.float64], times: NDArray[np.floating]) -> list[NoiseLevel]:
    """Return levels of given sigma / alpha, rounded to float32 as in diffusers, and timesteps."""
    levels = []
    for ratio, time in zip(ratios.astype(np.float32).tolist(), times.tolist(), strict=True):
        alpha = 1 / math.hypot(ratio, 1)
        levels.append(NoiseLevel(alpha, ratio * alpha, time))
    return levels
