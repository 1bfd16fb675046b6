"""Trajectory consistency sampling without fresh noise: Zheng et al. (2024), arXiv 2402.19159.

The stochasticity gamma is 0, as in diffusers' pipelines, which name it eta.
"""

from collections.abc import Sequence
from itertools import pairwise

from latentforge.runtime.sampling.ddim import first_order
from latentforge.runtime.sampling.lcm import distilled_timesteps
from latentforge.runtime.sampling.levels import NoiseInterval, NoisePlan
from latentforge.runtime.sampling.sampler import DiffusersScheduler, Sampler
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.sampling.spacing import level_at

__all__ = ["TCD"]


def _plan(schedule: Schedule, steps: int) -> NoisePlan:
    """Plan timesteps of the model's distillation, down to the first training timestep."""
    return _plan_from_timesteps(schedule, distilled_timesteps(schedule, steps))


def _plan_from_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> NoisePlan:
    """Plan these timesteps, down to the first training timestep."""
    levels = [level_at(schedule, t) for t in (*timesteps, 0)]
    return NoisePlan(tuple(NoiseInterval(*pair) for pair in pairwise(levels)))


TCD = Sampler(
    name="tcd",
    summary="for trajectory consistency models, without fresh noise (Zheng et al. 2024)",
    plan=_plan,
    plan_from_timesteps=_plan_from_timesteps,
    method=first_order,
    diffusers=DiffusersScheduler(
        name="TCDScheduler", follows=frozenset({"original_inference_steps"})
    ),
)
