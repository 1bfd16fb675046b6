"""Acceleration plan: the cheaper denoiser evaluations that an engine directory was gated for.

A plan takes effect here and nowhere else: resolve_acceleration() merges it into a request, and
StepPolicy says for each noise level of that request how the denoiser is evaluated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec

from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.record import Record
from latentforge.runtime.sampling.levels import NoiseLevel, NoisePlan
from latentforge.runtime.validation import check_count, shown

__all__ = [
    "MAX_STEPS",
    "AccelerationPlan",
    "DenoiserVariant",
    "StepPolicy",
    "check_plan",
    "resolve_acceleration",
]

MAX_STEPS = 1000
"""Largest number of steps of a request."""

DenoiserVariant = Literal["denoiser", "denoiser_reduced"]
"""Components that can make a full step: the denoiser, or the one with reduced attention."""


class AccelerationPlan(Record, frozen=True, kw_only=True):
    """Cheaper denoiser evaluations, measured and gated for one sampler and number of steps.

    Requests follow the plan unless they are unaccelerated. Its images are class B.

    Attributes:
        sampler, steps: the schedule that the plan was gated for.
        timesteps: one timestep of the model per step, strictly decreasing; the sampler's own if
            empty.
        guidance_interval: lowest and highest sigma (share of noise, 0 to 1) of the noise levels
            that use classifier-free guidance: Kynkaanniemi et al. (2024), arXiv 2404.07724. At
            other levels the denoiser runs on the positive prompts alone, one row per image. None
            applies guidance at every level.
        cached_steps: evaluations, counted from 0, that reuse the cached feature of the last full
            one: DeepCache, Ma et al. (2023), arXiv 2312.00858. Evaluation 0 is always full.
        variant: component that makes the full evaluations.
        measured: figures such as speedup, psnr and retrieval, relative to the unaccelerated
            engines.
    """

    sampler: str
    steps: Annotated[int, msgspec.Meta(ge=1)]
    timesteps: tuple[float, ...] = ()
    guidance_interval: tuple[float, float] | None = None
    cached_steps: tuple[int, ...] = ()
    variant: DenoiserVariant = "denoiser"
    measured: Mapping[str, float] = {}

    def __post_init__(self) -> None:
        try:
            check_plan(self.steps, self.timesteps, self.guidance_interval, self.cached_steps)
        except SettingsError as error:
            raise ManifestError(f"acceleration: {error}") from error

    @property
    def request(self) -> dict[str, Any]:
        """Request settings that apply the plan, by name."""
        return {key: getattr(self, key) for key in self.__struct_fields__ if key != "measured"}


def check_plan(
    steps: int,
    timesteps: Sequence[float],
    guidance_interval: tuple[float, float] | None,
    cached_steps: Sequence[int],
) -> None:
    """Check that the parts of an AccelerationPlan fit each other and a schedule of `steps`.

    Raises:
        SettingsError: the parts contradict each other, or are out of order or range.
    """
    if timesteps and len(timesteps) != steps:
        raise SettingsError(
            f"{len(timesteps)} timesteps for {steps} steps: give one timestep per step"
        )
    if not all(later < earlier for earlier, later in pairwise(timesteps)):
        raise SettingsError("timesteps must be strictly decreasing, from noise to image")
    if guidance_interval is not None and not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        low, high = guidance_interval
        raise SettingsError(
            f"guidance_interval is two sigmas from 0 to 1, the lower first, not {low:g} and "
            f"{high:g}"
        )
    if not all(earlier < later for earlier, later in pairwise((0, *cached_steps, steps))):
        raise SettingsError(
            "cached_steps are counted from 0 and strictly increasing, and the first of "
            f"{steps} steps is always full: choose from 1 to {steps - 1}"
        )


def resolve_acceleration(
    defaults: Mapping[str, Any], request: Mapping[str, Any], plan: AccelerationPlan | None
) -> dict[str, Any]:
    """Merge the defaults, the plan and the request, the later of which override the earlier.

    The manifest's defaults and the caller's request are settings by name. The plan is left out if
    there is none or the request is unaccelerated. ``cache_interval`` becomes ``cached_steps``.

    Raises:
        SettingsError: the plan is for another sampler or number of steps than the request, or
            cache_interval contradicts the request.
    """
    planned: dict[str, Any] = {}
    if plan is not None and not request.get("unaccelerated"):
        _check_schedule(plan, request)
        planned = plan.request
    settings = {**defaults, **planned, **request}
    interval = settings.pop("cache_interval", None)
    if interval is None:
        return settings
    if "cached_steps" in request:
        raise SettingsError("cache_interval and cached_steps exclude each other: give one")
    return {**settings, "cached_steps": _cached_steps(interval, settings["steps"])}


def _check_schedule(plan: AccelerationPlan, request: Mapping[str, Any]) -> None:
    sampler, steps = request.get("sampler", plan.sampler), request.get("steps", plan.steps)
    if (sampler, steps) != (plan.sampler, plan.steps):
        raise SettingsError(
            f"these engines' plan is for {plan.sampler!r} with {plan.steps} steps, not "
            f"{shown(sampler)} with {shown(steps)}: omit sampler and steps, or ignore the plan "
            "with unaccelerated (--unaccelerated)"
        )


def _cached_steps(interval: int, steps: int) -> tuple[int, ...]:
    """Return all evaluations except every interval-th, which are full."""
    check_count("cache_interval", interval, MAX_STEPS)
    check_count("steps", steps, MAX_STEPS)
    if interval > steps:
        raise SettingsError(
            f"cache_interval {interval} is longer than the run of {steps} steps: use 2 to "
            f"{steps}, or 1 for full evaluations only"
        )
    return tuple(index for index in range(steps) if index % interval)


@dataclass(frozen=True, kw_only=True)
class StepPolicy:
    """Evaluation of the denoiser at each noise level of one request.

    Attributes:
        guidance_interval: lowest and highest sigma with classifier-free guidance.
        cached_levels: levels of the cached steps.
    """

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cached_levels: frozenset[NoiseLevel] = frozenset()

    @classmethod
    def of(
        cls,
        guidance_interval: tuple[float, float] | None,
        cached_steps: Sequence[int],
        plan: NoisePlan,
    ) -> "StepPolicy":
        """Resolve the settings of a request, for the complete noise plan of its sampler.

        A run that starts late or ends early therefore caches the same levels, except that its
        first evaluation is full.
        """
        steps = (index for index in cached_steps if index < len(plan.intervals))
        return cls(
            guidance_interval=guidance_interval or (0.0, 1.0),
            cached_levels=frozenset(plan.intervals[index].start for index in steps),
        )

    def applies_guidance(self, level: NoiseLevel) -> bool:
        """Return True if classifier-free guidance applies at this level."""
        low, high = self.guidance_interval
        return low <= level.sigma <= high

    def is_cached(self, level: NoiseLevel) -> bool:
        """Return True if the evaluation at this level reuses the cached feature."""
        return level in self.cached_levels
