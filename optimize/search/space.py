"""Plans of cheaper evaluations: which there are, what each takes, and the fastest that will do.

Fewer steps, guidance on a part of them, shallow steps between full ones, and attention with fewer
keys save time by themselves and together, so the plans are a lattice: one that spares at least as
much as another in everything makes pictures that are hardly nearer to the exact ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from latentforge.runtime.manifest import AccelerationPlan
from latentforge.runtime.sampling.levels import NoiseLevel

__all__ = ["UNACCELERATED", "PlanCandidate", "Costs", "Variant", "candidates", "fastest"]

_STEPS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 30, 40, 50)
_GUIDED = ((0.0, 1.0), (0.0, 0.75), (0.25, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.0, 0.0))
_EVERY = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Engines that cheaper evaluations take.

    Attributes:
        level: of the skip connection at which the UNet is cut; None is not at all.
        reduced: whether self-attention has fewer keys and values.
    """

    level: int | None = None
    reduced: bool = False

    def __str__(self) -> str:
        cut = [] if self.level is None else [f"cut at level {self.level}"]
        return ", ".join([*cut, *(["reduced attention"] if self.reduced else [])]) or "exact"


UNACCELERATED = Variant()
"""The engines as they are."""


@dataclass(frozen=True, kw_only=True)
class PlanCandidate:
    """A plan, but for its sampler and timesteps.

    Attributes:
        steps: how many.
        guided: the part of them with guidance, as two shares of the way from noise to picture.
        every: each so many-th evaluation is a full one.
        variant: the engines that it takes.
    """

    steps: int
    guided: tuple[float, float] = (0.0, 1.0)
    every: int = 1
    variant: Variant = field(default=UNACCELERATED)

    @property
    def guides(self) -> range:
        """The steps with guidance, counted from 0."""
        first, last = (round(share * self.steps) for share in self.guided)
        return range(first, last)

    @property
    def cached_steps(self) -> tuple[int, ...]:
        """The evaluations that are not full."""
        return tuple(index for index in range(self.steps) if index % self.every)

    @property
    def evaluations(self) -> tuple[tuple[bool, bool], ...]:
        """Of each step whether it is guided, and whether it is shallow, as the runtime does it:
        a guided one after a full one without guidance has nothing to go on from."""
        done, known = [], False
        for index in range(self.steps):
            guided = index in self.guides
            shallow = index in self.cached_steps and (known or not guided)
            known = known if shallow else guided
            done.append((guided, shallow))
        return tuple(done)

    def spares(self, other: "PlanCandidate") -> bool:
        """Whether it does no more than another of anything that makes pictures better."""
        levels = [c.variant.level if c.every > 1 else None for c in (self, other)]
        mine, theirs = (float("inf") if level is None else level for level in levels)
        return (
            self.steps <= other.steps
            and other.guided[0] <= self.guided[0]
            and self.guided[1] <= other.guided[1]
            and self.every >= other.every
            and mine <= theirs
            and self.variant.reduced >= other.variant.reduced
        )

    def plan(
        self, sampler: str, timesteps: tuple[float, ...], levels: Sequence[NoiseLevel]
    ) -> AccelerationPlan:
        """The plan of a sampler along timesteps, none for its own, which start at these levels."""
        return AccelerationPlan(
            sampler=sampler,
            steps=self.steps,
            timesteps=timesteps,
            guidance_interval=self._interval([level.sigma for level in levels]),
            cached_steps=self.cached_steps,
            variant="denoiser_reduced" if self.variant.reduced else "denoiser",
        )

    def _interval(self, sigmas: Sequence[float]) -> tuple[float, float] | None:
        """Bounds halfway between the levels with guidance and those without."""
        first, last = self.guides.start, self.guides.stop
        if first == last:
            return (0.0, 0.0)  # no level that is evaluated has so little noise
        if (first, last) == (0, self.steps):
            return None
        most = (sigmas[first - 1] + sigmas[first]) / 2 if first else 1.0
        least = (sigmas[last - 1] + sigmas[last]) / 2 if last < len(sigmas) else 0.0
        return (least, most)

    def __str__(self) -> str:
        count = len(self.guides)
        parts = [f"{self.steps} steps"]
        parts += [f"{count} guided"] if count < self.steps else []
        parts += [f"{len(self.cached_steps)} shallow"] if self.cached_steps else []
        return ", ".join([*parts, *([] if self.variant == UNACCELERATED else [str(self.variant)])])


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured once, in seconds.

    Attributes:
        fixed: all of an image but the UNet's steps.
        calls: of a step by variant, whether it is guided and whether it is shallow.
    """

    fixed: float
    calls: Mapping[tuple[Variant, bool, bool], float]

    def seconds(self, candidate: PlanCandidate) -> float:
        """What an image will take."""
        kinds = ((candidate.variant, *kind) for kind in candidate.evaluations)
        return self.fixed + sum(self.calls[kind] for kind in kinds)


def candidates(steps: int, variants: Sequence[Variant], *, guided: bool) -> list[PlanCandidate]:
    """All plans of at most so many steps, each once.

    Args:
        steps: of the schedule that they are to stand for.
        variants: engines that there are.
        guided: whether there is guidance that could be left out.
    """
    counts = [*(count for count in _STEPS if count < steps), steps]
    parts = _GUIDED if guided else _GUIDED[:1]
    found: dict[tuple[object, ...], PlanCandidate] = {}
    for count, part, every, variant in product(counts, parts, _EVERY, variants):
        if (every > 1) != (variant.level is not None) or count < 2 * every > 2:
            continue
        each = PlanCandidate(steps=count, guided=part, every=every, variant=variant)
        found.setdefault((count, tuple(each.guides), every, variant), each)
    return list(found.values())


def fastest(
    some: Sequence[PlanCandidate],
    seconds: Callable[[PlanCandidate], float],
    passes: Callable[[PlanCandidate], bool],
    *,
    tries: int,
) -> PlanCandidate | None:
    """The fastest that passes, by halving what is left: the one in the middle is asked.

    Where it passes, those that take longer need not be asked; where it fails, those that spare
    as much in everything would too. After so many tries it is the fastest that has passed.
    """
    taking = {each: seconds(each) for each in some}
    best, left = None, sorted(taking, key=taking.__getitem__)
    for _ in range(tries):
        if not left:
            break
        middle = left[len(left) // 2]
        if passes(middle):
            best, left = middle, [each for each in left if taking[each] < taking[middle]]
        else:
            left = [each for each in left if not each.spares(middle)]
    return best
