"""Selection of the student among the best structures, and comparison with others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import median

from numpy.random import Generator

from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.measure.results import ConfidenceInterval
from latentforge.runtime.errors import GateError
from latentforge.runtime.progress import Progress
from latentforge.train.search.baselines import (
    Baseline,
    published_structures,
    random_structure,
    uniform_structure,
)
from latentforge.train.search.clock import Clock
from latentforge.train.search.evolution import EvolutionSettings, evolve
from latentforge.train.search.greedy import greedy_path
from latentforge.train.search.knapsack import FrontPoint, pareto_front
from latentforge.train.search.latency.records import Latency
from latentforge.train.search.problem import Problem, smallest_cost
from latentforge.train.search.search_record import Kind, SearchPoint
from latentforge.train.search.student_errors import StudentErrors
from latentforge.train.search.variants import WHOLE, Variants

__all__ = ["Selection"]

_TURNS = 7  # pairs of steps that a structure is timed with: an interval of 98 %
_STARTS = 8  # structures of the front that an evolution starts from
_TIMED = 4  # of its best
_EVOLUTION = 0.5  # of the time left, at most
_ROUNDS = 10  # of evolution and timing, each with a stricter limit
_STRICTER = 0.97  # than the last one, at least
_TOLERANCE = 1.005  # of a measured latency
_RANDOM = 8  # random baselines, of which the best is timed
_CURVE = (1.25, 1.5, 2.0, 3.0, 4.0)
"""Ratios of the cost at which other structures of the search are shown."""


class Selection:
    """Selection within the limit of a problem.

    Attributes:
        chosen: the student, once choose() has run.
        points: the teacher, the student, and those that compare() adds.
    """

    def __init__(
        self,
        problem: Problem,
        errors: StudentErrors,
        variants: Variants,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self.chosen = WHOLE
        self.points: tuple[SearchPoint, ...] = ()
        self._problem, self._errors, self._variants = problem, errors, variants
        self._progress, self._clock = progress, clock
        self._latencies: dict[SearchedStructure, Latency] = {}

    @cached_property
    def front(self) -> list[FrontPoint]:
        """Pareto front of sums."""
        problem = self._problem
        return pareto_front(problem.sites, problem.cost.saved, problem.score)

    def choose(self, random: Generator, *, timed: bool, greedy: bool) -> None:
        """Choose the structure of the least true error whose cost is within the limit.

        Args:
            random: source of the evolution's choices.
            timed: the cost is the latency, which is measured; each round has a stricter limit, by
                how far measured latencies exceed predictions.
            greedy: also try greedy removal with true errors.

        Raises:
            GateError: none of the best is measured to be.
        """
        limit, fastest = self._problem.limit, math.inf
        least = smallest_cost(self._problem.sites, self._problem.cost)
        for _ in range(_ROUNDS):
            problem = replace(self._problem, limit=limit)
            best = self._best(problem, random, greedy=greedy)[: _TIMED if timed else 1]
            if not best:
                break
            self._time(best, "latencies of the best")
            fitting = [s for s in best if not timed or self._measured(s) <= _TOLERANCE]
            if fitting:
                self.chosen = fitting[0]
                return
            fastest = min([fastest, *map(self._measured, best)])
            limit *= min(_STRICTER, 1 / median(map(self._measured, best)))
            limit = max(limit, least)
        raise GateError(
            f"the best students take {fastest:.2f} times the latency that was asked for, by "
            "measurement: is the machine busy? search again with the same --work"
        )

    def compare(self, random: Generator) -> None:
        """Time other structures as far as there is time, and keep all points."""
        others: dict[Kind, list[Baseline]] = {
            "searched": [*self._curve()],
            "baseline": [*self._baselines(random)],
        }
        structures = [b.structure for each in others.values() for b in each]
        self._time(structures, "latencies", optional=True)
        self.points = (
            self._point("teacher", "teacher", WHOLE),
            self._point("student", "chosen", self.chosen),
            *(self._point(b.name, kind, b.structure) for kind, bs in others.items() for b in bs),
        )

    # choosing

    def _best(
        self, problem: Problem, random: Generator, *, greedy: bool
    ) -> list[SearchedStructure]:
        """Return the structures of the least true error, best first; none if none fits."""
        go_on, starts = self._clock.during(_EVOLUTION), self._starts(problem, random)
        if greedy:
            path = greedy_path(problem, self._errors, self._clock.during(_EVOLUTION / 2))
            starts += [path[-1]] if problem.fits(path[-1]) else []
        settings, done = EvolutionSettings(), 0

        def error(structure: SearchedStructure) -> float:
            nonlocal done
            done += 1
            total = len(starts) + settings.evaluations
            self._progress.within("errors of the evolution", done, max(done, total))
            return self._errors(structure)

        return list(evolve(problem, starts, error, random, settings, go_on)) if starts else []

    def _starts(self, problem: Problem, random: Generator) -> list[SearchedStructure]:
        """Return structures of the front within the limit, those of the least sums."""
        within = [p for p in self.front if problem.fits(p.structure)]
        nearest = sorted(within, key=lambda point: point.error)[:_STARTS]
        repaired = (problem.repaired(p.structure.choices, random) for p in nearest[:2])
        return list(dict.fromkeys([*(p.structure for p in nearest), *filter(None, repaired)]))

    def _measured(self, structure: SearchedStructure) -> float:
        """Return a measured latency relative to the limit."""
        ratio = self._latencies[structure].ratio.value
        return ratio * self._problem.cost.whole / self._problem.limit

    def _time(
        self, structures: Sequence[SearchedStructure], activity: str, *, optional: bool = False
    ) -> None:
        """Time the structures that were not timed; optional ones while there is time."""
        new = [s for s in dict.fromkeys(structures) if s not in self._latencies]
        for index, structure in enumerate(new):
            if optional and not self._clock.left:
                break
            [self._latencies[structure]] = self._variants.measure([structure], repeats=_TURNS)
            self._progress.within(activity, index + 1, len(new))

    # comparing

    def _curve(self) -> Iterator[Baseline]:
        """Yield structures of the front at other ratios of the cost."""
        cost = self._problem.cost
        for ratio in _CURVE:
            problem = replace(self._problem, limit=cost.whole / ratio)
            within = [p for p in self.front if problem.fits(p.structure)]
            best = min(within, key=lambda point: point.error, default=None)
            if best is not None and best.structure not in (self.chosen, WHOLE):
                yield Baseline(name=f"predicted {ratio:g}x", structure=best.structure)

    def _baselines(self, random: Generator) -> Iterator[Baseline]:
        """Yield published structures, and uniform and random pruning to the limit."""
        yield from published_structures(self._problem.sites)
        if (uniform := uniform_structure(self._problem)) is not None:
            yield Baseline(name="uniform pruning", structure=uniform)
        drawn = (random_structure(self._problem, random) for _ in range(_RANDOM))
        if found := [structure for structure in drawn if structure is not None]:
            best = min(found, key=self._errors)
            yield Baseline(name=f"best of {len(found)} random", structure=best)

    def _point(self, name: str, kind: Kind, structure: SearchedStructure) -> SearchPoint:
        cost, latency = self._problem.cost, self._latencies.get(structure)
        whole = self._latencies[self.chosen].whole
        measured = None if latency is None else whole * latency.ratio.value
        return SearchPoint(
            name=name,
            kind=kind,
            choices=structure.choices,
            error=self._errors(structure),
            cost=cost.total(structure),
            measured=whole if structure == WHOLE else measured,
            speedup=None if latency is None else _inverse(latency.ratio),
            parameters=self._errors.parameters(structure),
        )


def _inverse(ratio: ConfidenceInterval) -> ConfidenceInterval:
    """Return the speedup of a ratio of times."""
    low, high = (None if bound is None else 1 / bound for bound in (ratio.high, ratio.low))
    return ConfidenceInterval(value=1 / ratio.value, low=low, high=high, level=ratio.level)
