"""Timesteps that samplers visit, and the noise levels at them.

Lin et al. (2023, arXiv 2305.08891, table 2) name three spacings of timesteps. The diffusers
schedulers, which this follows to the last rounding, read each in their own way.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.levels import NoiseLevel
from latentforge.runtime.sampling.schedule import Schedule, Spacing

__all__ = [
    "check_steps",
    "level_at",
    "levels_at",
    "levels_of_ratios",
    "noise_ratios",
    "spaced_timesteps",
    "timesteps_of_ratios",
]

_NEARLY_ZERO = 2.0**-24  # replaces alpha**2 = 0 where a sampler works with sigma / alpha


def check_steps(schedule: Schedule, steps: int) -> int:
    """Return the number of steps if the schedule has that many.

    Raises:
        SettingsError: it is below 1, or above the number of training timesteps.
    """
    if not 1 <= steps <= schedule.train_steps:
        raise SettingsError(f"{steps} steps: choose between 1 and {schedule.train_steps}")
    return steps


def spaced_timesteps(schedule: Schedule, count: int, default: Spacing) -> NDArray[np.float64]:
    """Return decreasing timesteps in one of the three spacings, of shape (count,).

    Args:
        schedule: names the spacing.
        count: number of timesteps.
        default: the sampler's own spacing, for a schedule that names none.
    """
    total = schedule.train_steps
    match schedule.spacing or default:
        case "leading":
            return np.arange(float(count))[::-1] * (total // count) + schedule.offset
        case "trailing":
            return np.round(np.arange(total, 0.0, -total / count)[:count]) - 1
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
