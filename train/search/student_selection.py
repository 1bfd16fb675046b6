"""Selection of the student among the best structures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from statistics import median

from numpy.random import Generator

from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.runtime.errors import GateError
from latentforge.runtime.progress import Progress
from latentforge.train.search.clock import Clock
from latentforge.train.search.evolution import EvolutionSettings, best_within, evolve
from latentforge.train.search.greedy import greedy_path
from latentforge.train.search.knapsack import FrontPoint, pareto_front
from latentforge.train.search.latency.records import Latency
from latentforge.train.search.problem import Problem, smallest_cost
from latentforge.train.search.student_errors import StudentErrors
from latentforge.train.search.variants import WHOLE, Variants

__all__ = ["Selection"]

_TURNS = 7  # pairs of steps that a structure is timed with: an interval of 98 %
_STARTS = 8  # structures of the front that an evolution starts from
_JUDGED = 4  # structures of the front whose true error is measured for a latency
_TIMED = 4  # of the best by true error
_EVOLUTION = 0.5  # of the time left, at most
_ROUNDS = 10  # of evolution and timing, each with a stricter limit
_STRICTER = 0.97  # than the last one, at least
_TOLERANCE = 1.005  # of a measured latency


class Selection:
    """Selection within the limit of a problem.

    Attributes:
        chosen: the student, once choose() has run.
        latencies: of the structures that were timed.
        errors: true errors of structures.
        progress: of the search.
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
        self.errors, self.progress = errors, progress
        self._problem, self._variants, self._clock = problem, variants, clock
        self.latencies: dict[SearchedStructure, Latency] = {}

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
            self.time(best, "latencies of the best")
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

    # choosing

    def within(self, limit: float) -> list[SearchedStructure]:
        """Return structures within a cost, best first: all whose true error is measured.

        They include those of the front with the least sums.
        """
        problem = replace(self._problem, limit=limit)
        for structure in self._nearest(problem, _JUDGED):
            self.errors(structure)
        return best_within(problem, self.errors.measured)

    def _best(
        self, problem: Problem, random: Generator, *, greedy: bool
    ) -> list[SearchedStructure]:
        """Return the structures of the least true error, best first; none if none fits."""
        go_on = self._clock.during(_EVOLUTION)
        if greedy:
            greedy_path(problem, self.errors, self._clock.during(_EVOLUTION / 2))
        starts, settings, done = self._starts(problem, random), EvolutionSettings(), 0

        def error(structure: SearchedStructure) -> float:
            nonlocal done
            done += 1
            total = len(starts) + settings.evaluations
            self.progress.within("errors of the evolution", done, max(done, total))
            return self.errors(structure)

        for structure in starts:
            if not done or go_on():
                error(structure)
        evolve(problem, self.errors.measured, error, random, settings, go_on)
        return best_within(problem, self.errors.measured)

    def _starts(self, problem: Problem, random: Generator) -> list[SearchedStructure]:
        """Return structures of the front: those of the least sums within the limit, then others."""
        nearest = self._nearest(problem, _STARTS)
        repaired = (problem.repaired(s.choices, random) for s in nearest[:2])
        others = self.front[:: max(1, len(self.front) // _STARTS)]
        return [*dict.fromkeys([*nearest, *filter(None, repaired), *(p.structure for p in others)])]

    def _nearest(self, problem: Problem, count: int) -> list[SearchedStructure]:
        """Return the structures of the front with the least sums within the limit."""
        within = [p for p in self.front if problem.fits(p.structure)]
        return [p.structure for p in sorted(within, key=lambda p: p.error)[:count]]

    def _measured(self, structure: SearchedStructure) -> float:
        """Return a measured latency relative to the limit."""
        ratio = self.latencies[structure].ratio.value
        return ratio * self._problem.cost.whole / self._problem.limit

    def time(
        self, structures: Sequence[SearchedStructure], activity: str, *, optional: bool = False
    ) -> None:
        """Time the structures that were not timed; optional ones while there is time."""
        new = [s for s in dict.fromkeys(structures) if s not in self.latencies]
        for index, structure in enumerate(new):
            if optional and not self._clock.left:
                break
            [self.latencies[structure]] = self._variants.measure([structure], repeats=_TURNS)
            self.progress.within(activity, index + 1, len(new))
