"""Interface of the samplers: a denoiser and a noise plan in, one set of latents per step out.

A denoiser maps (x, level) to its estimate of the clean latent, where x = alpha * clean +
sigma * noise. Guidance and engines are hidden behind it.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.sampling.levels import CLEAN, NoiseLevel, NoisePlan
from latentforge.runtime.sampling.moves import blend
from latentforge.runtime.sampling.prediction import Prediction, PredictionType, prediction_type
from latentforge.runtime.sampling.schedule import EDMSchedule, Schedule

__all__ = [
    "Array",
    "Denoiser",
    "DiffusersScheduler",
    "MaskBlend",
    "Method",
    "Noise",
    "Planner",
    "Sampler",
    "SamplerRun",
    "SamplerStep",
    "TimestepPlanner",
    "Updates",
]

Array = NDArray[np.float32]

Denoiser = Callable[[Array, NoiseLevel], Array]
"""(x, level) -> estimate of the clean latent."""

Noise = Callable[[], Array]
"""Draws standard normal noise of the latents' shape."""

MaskBlend = Callable[[Array, NoiseLevel], Array]
"""(x, level) -> x with the image, noised to this level, put back outside of the mask."""

Planner = Callable[[Any, int], NoisePlan]
"""(schedule, steps) -> plan; the schedule is of the sampler's kind."""

TimestepPlanner = Callable[[Schedule, Sequence[float]], NoisePlan]
"""(schedule, timesteps) -> plan; timesteps are strictly decreasing and may be fractional."""


@dataclass(frozen=True)
class SamplerStep:
    """One completed step of a sampling run.

    Attributes:
        index: 0 for the first of `count` steps.
        level: noise level at the start of the step; its sigma decreases from about 1.
        latents: latents after the step.
        denoised: the denoiser's estimate of the clean latent in this step.
    """

    index: int
    count: int
    level: NoiseLevel
    latents: Array
    denoised: Array


@dataclass(frozen=True, kw_only=True)
class SamplerRun:
    """Inputs of a sampling method, besides the initial latents.

    Attributes:
        denoise: estimates the clean latent.
        plan: the steps to take.
        noise: draws fresh noise.
        prediction: prediction type of the network behind the denoiser.
        mask_blend: applied to latents before the network is evaluated on them.
    """

    denoise: Denoiser
    plan: NoisePlan
    noise: Noise
    prediction: PredictionType
    mask_blend: MaskBlend


Updates = Generator[tuple[Array, Array], Array, None]
"""Yields (latents, denoised) after each interval, and is sent the latents to continue from."""

Method = Callable[[SamplerRun, Array], Updates]
"""(run, initial latents) -> updates."""


@dataclass(frozen=True, kw_only=True)
class DiffusersScheduler:
    """diffusers scheduler that a sampler is numerically equal to.

    Attributes:
        name: class name.
        options: arguments of its from_config, besides the checkpoint's own configuration.
        explicit_timesteps: True if its set_timesteps needs the timesteps of the sampler's plan,
            because it cannot compute them from a number of steps.
        follows: arguments of its constructor that the sampler takes from the checkpoint, besides
            those of the noise schedule.
        aliases: further class names of the same numbers.
    """

    name: str
    options: Mapping[str, bool | int | str] = field(default_factory=dict)
    explicit_timesteps: bool = False
    follows: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Sampling method together with the noise levels that it visits.

    Attributes:
        name: as in a request.
        summary: one line of help.
        plan: computes the levels from a number of steps.
        plan_from_timesteps: computes them from timesteps; None if the sampler's levels are not a
            function of timesteps.
        method: steps from level to level.
        diffusers: the equivalent diffusers scheduler.
        schedule: kind of schedule that it steps along.
    """

    name: str
    summary: str
    plan: Planner
    plan_from_timesteps: TimestepPlanner | None
    method: Method
    diffusers: DiffusersScheduler
    schedule: type[Schedule] | type[EDMSchedule] = Schedule

    def run(
        self,
        denoise: Denoiser,
        plan: NoisePlan,
        noise: Noise,
        *,
        prediction: Prediction,
        latents: Array | None = None,
        mask_blend: MaskBlend | None = None,
    ) -> Iterator[SamplerStep]:
        """Sample along the plan and yield after each of its intervals.

        Args:
            denoise: estimates the clean latent in (x, level).
            plan: result of `plan`, or a part of it.
            noise: draws standard normal noise of the latents' shape: first the initial latents,
                then fresh noise for a stochastic sampler.
            prediction: prediction type of the network; PNDM averages the network's outputs.
            latents: initial latents at the level where the plan starts, instead of noise.
            mask_blend: returns the latents to continue from, given those of a step and the level
                where the next interval starts (clean after the last). For inpainting it puts
                the image, noised to that level, back outside of the mask (Lugmayr et al. 2022,
                equation 8). Heun's method also calls it halfway, where it evaluates the network.
        """
        x = blend((plan.scale, noise())) if latents is None else latents
        run = SamplerRun(
            denoise=denoise,
            plan=plan,
            noise=noise,
            prediction=prediction_type(prediction),
            mask_blend=mask_blend or _unchanged,
        )
        updates = self.method(run, x)
        levels = [interval.start for interval in plan.intervals]
        for index, (level, reached) in enumerate(pairwise([*levels, CLEAN])):
            x, denoised = updates.send(x) if index else next(updates)
            x = run.mask_blend(x, reached)
            yield SamplerStep(index, len(levels), level, x, denoised)


def _unchanged(x: Array, _: NoiseLevel) -> Array:
    return x
