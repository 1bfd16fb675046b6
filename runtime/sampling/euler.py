"""Euler's method in sigma / alpha: Karras et al. (2022), arXiv 2206.00364."""

from collections.abc import Sequence

import numpy as np

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.ddim import first_order
from latentforge.runtime.sampling.levels import NoiseLevel, NoisePlan, chain
from latentforge.runtime.sampling.sampler import DiffusersScheduler, Sampler
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.sigmas import respaced
from latentforge.runtime.sampling.spacing import (
    Rounding,
    check_steps,
    final_level,
    levels_at,
    levels_of_ratios,
    noise_ratios,
    respaced_levels,
    spaced_timesteps,
    unrounded,
)

__all__ = [
    "EULER",
    "SIGMA_OPTIONS",
    "plan_euler",
    "plan_euler_from_timesteps",
    "sigma_levels",
    "start_scale",
    "unscaled",
]

SIGMA_OPTIONS = frozenset(
    "use_karras_sigmas use_exponential_sigmas use_beta_sigmas sigma_min sigma_max".split()
)
"""Options of the diffusers schedulers that step in sigma / alpha."""

_OPTIONS = SIGMA_OPTIONS | {"interpolation_type", "timestep_type", "final_sigmas_type"}


def sigma_levels(
    schedule: Schedule, steps: int, rounding: Rounding = unrounded
) -> list[NoiseLevel]:
    """Return levels at timesteps that may be fractional, without the final one.

    They are at the spacing of sigma / alpha that the schedule's options name, if they name one,
    between the levels at the first and the last timestep.
    """
    times = spaced_timesteps(schedule, check_steps(schedule, steps), "linspace").astype(np.float32)
    levels = levels_at(schedule, times.tolist())
    if not schedule.options.sigma_spacing:
        return levels
    ends = np.array([level.sigma / level.alpha for level in (levels[0], levels[-1])])
    return respaced_levels(schedule, steps, ends, rounding)


def start_scale(schedule: Schedule, first: NoiseLevel) -> float:
    """Return the standard deviation of the initial latents.

    It is sigma, or 1 if the spacing is "leading": diffusers starts in these two ways, depending on
    the spacing.
    """
    return 1.0 if schedule.spacing == "leading" else first.sigma


def plan_euler(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan timesteps that may be fractional, down to the final level that the options name."""
    schedule = schedule.followed(_OPTIONS)
    levels, last = sigma_levels(schedule, steps), final_level(schedule)
    if schedule.options.interpolation_type == "log_linear":
        *levels, last = _log_linear(schedule, levels, last)
    if schedule.options.continuous_timesteps:
        levels = [level._replace(timestep=-level.log_snr / 4) for level in levels]
    return NoisePlan(chain(levels, unscaled(last)), start_scale(schedule, levels[0]))


def unscaled(last: NoiseLevel) -> NoiseLevel:
    """Return a final level with alpha 1: Euler's latents end as clean + sigma / alpha * noise."""
    return NoiseLevel(1.0, last.sigma / last.alpha, last.timestep) if last.sigma else last


def _log_linear(schedule: Schedule, levels: list[NoiseLevel], last: NoiseLevel) -> list[NoiseLevel]:
    """Return levels evenly spaced in the logarithm over the whole schedule, and the final one.

    Without another spacing the final level is one of them, and the timesteps stay where they were.
    """
    count, table = len(levels), noise_ratios(schedule)
    ratios = respaced("exponential", float(table[-1]), float(table[0]), count + 1)
    if schedule.options.sigma_spacing:
        return [*respaced_levels(schedule, count, ratios, unrounded), last]
    return levels_of_ratios(ratios, np.array([*(level.timestep for level in levels), 0.0]))


def plan_euler_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan these timesteps, down to the final level that the options name.

    Raises:
        SettingsError: the model takes the noise level instead of timesteps.
    """
    schedule = schedule.followed(_OPTIONS)
    if schedule.options.continuous_timesteps:
        raise SettingsError("this model takes continuous timesteps: set steps instead")
    levels = levels_at(schedule, timesteps)
    return NoisePlan(
        chain(levels, unscaled(final_level(schedule))), start_scale(schedule, levels[0])
    )


EULER = Sampler(
    name="euler",
    summary="first order (Karras et al. 2022)",
    plan=plan_euler,
    plan_from_timesteps=plan_euler_from_timesteps,
    method=first_order,
    diffusers=DiffusersScheduler(name="EulerDiscreteScheduler", follows=_OPTIONS),
)
