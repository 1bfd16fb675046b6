"""Search space of acceleration plans: candidates, estimated time, and the fastest that passes.

Fewer steps, guidance on some of the steps, cached steps between full ones, and self-attention with
fewer keys each save time, alone and together. The candidates are therefore partially ordered: a
plan that saves at least as much as another in every respect makes images that are hardly closer to
the unaccelerated ones. fastest_passing() uses this to judge few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from latentforge.runtime.manifest import AccelerationPlan
from latentforge.runtime.sampling.levels import NoiseLevel

__all__ = [
    "UNACCELERATED",
    "Costs",
    "EvaluationKind",
    "PlanCandidate",
    "Variant",
    "fastest_passing",
    "list_candidates",
]

_STEPS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 30, 40, 50)
_GUIDED = ((0.0, 1.0), (0.0, 0.75), (0.25, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.0, 0.0))
_CACHE_INTERVALS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Engines that a plan needs.

    Attributes:
        level: of the skip connection at which the denoiser is split for cached steps; None
            leaves it whole.
        reduced: True if self-attention has fewer keys and values.
    """

    level: int | None = None
    reduced: bool = False

    def __str__(self) -> str:
        split = [] if self.level is None else [f"split at level {self.level}"]
        parts = [*split, *(["reduced attention"] if self.reduced else [])]
        return ", ".join(parts) or "unaccelerated"


UNACCELERATED = Variant()
"""Engines as they are."""


class EvaluationKind(NamedTuple):
    """Properties of a denoiser evaluation on which its time depends."""

    guided: bool
    cached: bool


@dataclass(frozen=True, kw_only=True)
class PlanCandidate:
    """Acceleration plan without its sampler and timesteps.

    Attributes:
        steps: number of steps.
        guided: part of the steps with guidance: its start and end as fractions of the steps,
            counted from noise to image.
        cache_interval: one full evaluation in so many; 1 has no cached steps.
        variant: engines that it needs.
    """

    steps: int
    guided: tuple[float, float] = (0.0, 1.0)
    cache_interval: int = 1
    variant: Variant = field(default=UNACCELERATED)

    @property
    def guided_steps(self) -> range:
        """Steps with guidance, counted from 0."""
        first, last = (round(share * self.steps) for share in self.guided)
        return range(first, last)

    @property
    def cached_steps(self) -> tuple[int, ...]:
        """Evaluations that reuse the cached feature, counted from 0."""
        return tuple(index for index in range(self.steps) if index % self.cache_interval)

    @property
    def evaluations(self) -> tuple[EvaluationKind, ...]:
        """Kind of every evaluation, as the runtime performs it.

        A guided evaluation after a full one without guidance has no cached feature for the
        negative prompts, so it is full even where the plan has a cached step.
        """
        evaluations, has_negative = [], False
        for index in range(self.steps):
            guided = index in self.guided_steps
            cached = index in self.cached_steps and (has_negative or not guided)
            has_negative = has_negative if cached else guided
            evaluations.append(EvaluationKind(guided=guided, cached=cached))
        return tuple(evaluations)

    def saves_as_much(self, other: PlanCandidate) -> bool:
        """Return True if this plan saves at least as much as another in every respect."""
        levels = [c.variant.level if c.cache_interval > 1 else None for c in (self, other)]
        level, other_level = (math.inf if level is None else level for level in levels)
        return (
            self.steps <= other.steps
            and other.guided[0] <= self.guided[0]
            and self.guided[1] <= other.guided[1]
            and self.cache_interval >= other.cache_interval
            and level <= other_level
            and self.variant.reduced >= other.variant.reduced
        )

    def plan(
        self, sampler: str, timesteps: tuple[float, ...], levels: Sequence[NoiseLevel]
    ) -> AccelerationPlan:
        """Return the plan for a sampler.

        Args:
            sampler: its name.
            timesteps: one per step; the sampler's own if empty.
            levels: noise levels at which the steps start.
        """
        return AccelerationPlan(
            sampler=sampler,
            steps=self.steps,
            timesteps=timesteps,
            guidance_interval=self._interval([level.sigma for level in levels]),
            cached_steps=self.cached_steps,
            variant="denoiser_reduced" if self.variant.reduced else "denoiser",
        )

    def _interval(self, sigmas: Sequence[float]) -> tuple[float, float] | None:
        """Return bounds halfway between noise levels with and without guidance; None for all."""
        first, last = self.guided_steps.start, self.guided_steps.stop
        if first == last:
            return (0.0, 0.0)  # below the noise level of every evaluation
        if (first, last) == (0, self.steps):
            return None
        high = (sigmas[first - 1] + sigmas[first]) / 2 if first else 1.0
        low = (sigmas[last - 1] + sigmas[last]) / 2 if last < len(sigmas) else 0.0
        return (low, high)

    def __str__(self) -> str:
        guided, cached = len(self.guided_steps), len(self.cached_steps)
        parts = [f"{self.steps} steps"]
        parts += [f"{guided} guided"] if guided < self.steps else []
        parts += [f"{cached} cached"] if cached else []
        return ", ".join([*parts, *([] if self.variant == UNACCELERATED else [str(self.variant)])])


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured seconds from which the time of any plan is estimated.

    Attributes:
        fixed: everything of an image but the denoiser evaluations.
        evaluations: one evaluation by variant and kind.
    """

    fixed: float
    evaluations: Mapping[tuple[Variant, EvaluationKind], float]

    def seconds(self, candidate: PlanCandidate) -> float:
        """Return the estimated seconds of one image."""
        kinds = candidate.evaluations
        return self.fixed + sum(self.evaluations[candidate.variant, kind] for kind in kinds)


def list_candidates(
    steps: int, variants: Sequence[Variant], *, guided: bool
) -> list[PlanCandidate]:
    """Return all different plans of at most ``steps`` steps.

    Args:
        steps: of the unaccelerated schedule.
        variants: engines that can be made.
        guided: True if the request uses guidance, which a plan may leave out.
    """
    counts = [*(count for count in _STEPS if count < steps), steps]
    parts = _GUIDED if guided else _GUIDED[:1]
    candidates: dict[tuple[object, ...], PlanCandidate] = {}
    for count, part, interval, variant in product(counts, parts, _CACHE_INTERVALS, variants):
        if (interval > 1) != (variant.level is not None) or count < 2 * interval > 2:
            continue
        candidate = PlanCandidate(
            steps=count, guided=part, cache_interval=interval, variant=variant
        )
        key = (count, tuple(candidate.guided_steps), interval, variant)
        candidates.setdefault(key, candidate)
    return list(candidates.values())


def fastest_passing(
    candidates: Sequence[PlanCandidate],
    seconds: Callable[[PlanCandidate], float],
    passes: Callable[[PlanCandidate], bool],
    *,
    tries: int,
) -> PlanCandidate | None:
    """Return the fastest candidate that passes, by bisection over the estimated seconds.

    The median of the remaining candidates is judged. If it passes, slower ones are dropped. If it
    fails, those that save as much in every respect are dropped, since they would fail too.

    Args:
        candidates: in any order.
        seconds: estimated time of a candidate.
        passes: judges a candidate.
        tries: number of candidates that are judged, at most. The result is then the fastest of
            those that have passed.

    Returns:
        The candidate; None if none has passed.
    """
    estimates = {candidate: seconds(candidate) for candidate in candidates}
    best, left = None, sorted(estimates, key=estimates.__getitem__)
    for _ in range(tries):
        if not left:
            break
        middle = left[len(left) // 2]
        if passes(middle):
            best, left = middle, [c for c in left if estimates[c] < estimates[middle]]
        else:
            left = [c for c in left if not c.saves_as_much(middle)]
    return best
