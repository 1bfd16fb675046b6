"""Acceleration plan: the cheaper denoiser evaluations that an engine directory was gated for."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec

from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.record import Record

__all__ = ["AccelerationPlan", "DenoiserVariant", "check_plan"]

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
        return {
            "sampler": self.sampler,
            "steps": self.steps,
            "timesteps": self.timesteps,
            "guidance_interval": self.guidance_interval,
            "cached_steps": self.cached_steps,
            "variant": self.variant,
        }


def check_plan(
    steps: int,
    timesteps: Sequence[float],
    guidance_interval: tuple[float, float] | None,
    cached_steps: Sequence[int],
) -> None:
    """Check that the parts of a plan fit each other and a schedule of this many steps.

    Args:
        steps: number of denoiser evaluations that the sampler schedules.
        timesteps, guidance_interval, cached_steps: see AccelerationPlan.

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
            f"guidance_interval is two sigmas from 0 to 1, the lower first, not {low:g} and {high:g}"
        )
    if not all(earlier < later for earlier, later in pairwise((0, *cached_steps, steps))):
        raise SettingsError(
            "cached_steps are counted from 0 and strictly increasing, and the first of "
            f"{steps} steps is always full: choose from 1 to {steps - 1}"
        )
