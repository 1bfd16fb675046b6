"""Euler's method in sigma / alpha: Karras et al. (2022), arXiv 2206.00364."""

from collections.abc import Sequence

import numpy as np

from latentforge.runtime.sampling.ddim import first_order
from latentforge.runtime.sampling.levels import NoisePlan, chain
from latentforge.runtime.sampling.sampler import DiffusersScheduler, Sampler
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import check_steps, levels_at, spaced_timesteps

__all__ = ["EULER", "plan_euler", "plan_euler_from_timesteps"]


def plan_euler(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan timesteps that may be fractional, down to the clean latent."""
    times = spaced_timesteps(schedule, check_steps(schedule, steps), "linspace")
    return plan_euler_from_timesteps(schedule, times.astype(np.float32).tolist())


def plan_euler_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan these timesteps, down to the clean latent.

    The initial latents have standard deviation sigma, or 1 if the spacing is "leading": diffusers
    starts in these two ways, depending on the spacing.
    """
    levels = levels_at(schedule, timesteps)
    scale = 1.0 if schedule.spacing == "leading" else levels[0].sigma
    return NoisePlan(chain(levels), scale)


EULER = Sampler(
    name="euler",
    summary="first order (Karras et al. 2022)",
    plan=plan_euler,
    plan_from_timesteps=plan_euler_from_timesteps,
    method=first_order,
    diffusers=DiffusersScheduler(name="EulerDiscreteScheduler"),
)
