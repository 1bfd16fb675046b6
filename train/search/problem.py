"""Search problem: the sites, what choices cost and how much error they make, and the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
from numpy.random import Generator

from latentforge.export.models.searched_structure import Choice, SearchedStructure, Site
from latentforge.train.search.knapsack import SiteValue, pareto_front
from latentforge.train.search.latency.model import LatencyModel
from latentforge.train.search.variants import WHOLE

__all__ = ["Cost", "Problem", "latency_cost", "smallest_cost", "weight_cost"]

_JITTER = 0.3
"""Standard deviation of the logarithm by which a repair misjudges a change, for variety."""

_MOST_CHANGES = 1000  # of a repair


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Amount of a resource by structure: time, parameters or memory.

    Attributes:
        whole: amount of the teacher.
        total: amount of a structure.
        saved: amount that a choice alone saves.
    """

    whole: float
    total: Callable[[SearchedStructure], float]
    saved: SiteValue


def latency_cost(model: LatencyModel) -> Cost:
    """Return the predicted seconds of a step as a cost."""
    return Cost(whole=model.seconds(WHOLE), total=cache(model.seconds), saved=cache(model.saved))


def weight_cost(parameters: Callable[[SearchedStructure], int], bytes_each: float = 1.0) -> Cost:
    """Return the parameters of a structure as a cost, or their bytes.

    They add up, but for an attention whose transformer blocks are all dropped, which vanishes with
    its projections: then the structure has fewer.

    Args:
        parameters: counts those of a structure's UNet.
        bytes_each: of a parameter; 1 for a cost in parameters.
    """
    whole = parameters(WHOLE) * bytes_each

    @cache
    def saved(site: str, choice: Choice) -> float:
        return whole - parameters(SearchedStructure(choices={site: choice})) * bytes_each

    def total(structure: SearchedStructure) -> float:
        return whole - sum(saved(site, choice) for site, choice in structure.choices.items())

    return Cost(whole=whole, total=total, saved=saved)


def smallest_cost(sites: Sequence[Site], cost: Cost) -> float:
    """Return the cost of the structure that saves most, whatever its error."""
    *_, smallest = pareto_front(sites, cost.saved, lambda *_: 0.0)
    return cost.total(smallest.structure)


@dataclass(frozen=True, kw_only=True)
class _Change:
    """Change of one site's choice: what it saves and the score that it adds, both signed."""

    site: str
    choice: Choice
    saved: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sites with the cost and the score of each choice, and a limit of the cost.

    Attributes:
        sites: of the teacher.
        cost: of structures.
        limit: largest cost.
        score: error of a choice alone.
    """

    sites: Sequence[Site]
    cost: Cost
    limit: float
    score: SiteValue

    def fits(self, structure: SearchedStructure) -> bool:
        """Return True if a structure is within the limit and keeps cross-attention."""
        return structure.is_valid(self.sites) and self.cost.total(structure) <= self.limit

    def repaired(
        self, choices: Mapping[str, Choice], random: Generator
    ) -> SearchedStructure | None:
        """Return a structure near to these choices that just fits.

        Choices that save most for their score are added until it fits; then those whose saving is
        not needed are taken back. Which are best is misjudged a little, at random.

        Returns:
            None if it does not fit with all choices made.
        """
        structure = SearchedStructure.of(choices, self.sites)
        for _ in range(_MOST_CHANGES):
            if self.cost.total(structure) <= self.limit:
                structure = self._relaxed(structure, random)
                return structure if self.fits(structure) else None
            if (change := self._cheapest(structure, random)) is None:
                return None
            structure = self._changed(structure, change)
        return None

    def savings(
        self, structure: SearchedStructure, count: int
    ) -> Iterator[tuple[SearchedStructure, float]]:
        """Yield structures with one change that saves cost, and the saving: the best by score."""
        savings = [change for change in self._changes(structure) if change.saved > 0]
        savings.sort(key=lambda change: max(change.error, 0.0) / change.saved)
        valid = ((self._changed(structure, c), c.saved) for c in savings)
        yield from islice(((s, saved) for s, saved in valid if s.is_valid(self.sites)), count)

    def _cheapest(self, structure: SearchedStructure, random: Generator) -> _Change | None:
        """Return the change that saves most for its score."""
        savings = [c for c in self._changes(structure) if c.saved > 0]
        jitter = random.lognormal(0.0, _JITTER, len(savings))
        ratios = [max(c.error, 0.0) / c.saved * j for c, j in zip(savings, jitter, strict=True)]
        return savings[ratios.index(min(ratios))] if savings else None

    def _relaxed(self, structure: SearchedStructure, random: Generator) -> SearchedStructure:
        """Return a structure with choices of less score where the limit allows them."""
        for _ in range(_MOST_CHANGES):
            gains = [c for c in self._changes(structure) if c.error < 0]
            jitter = random.lognormal(0.0, _JITTER, len(gains))
            order = np.argsort([c.error * j for c, j in zip(gains, jitter, strict=True)])
            changed = (self._changed(structure, gains[int(i)]) for i in order)
            fitting = next((s for s in changed if self.cost.total(s) <= self.limit), None)
            if fitting is None:
                break
            structure = fitting
        return structure

    def _changes(self, structure: SearchedStructure) -> Iterator[_Change]:
        """Yield the changes of one site's choice, but of no stage's."""
        gone = structure.vanished(self.sites)
        for site in self.sites:
            if site.kind == "stage" or site.name in gone:
                continue
            present = structure.choice(site.name)
            saved, error = self._values(site.name, present)
            for choice in site.choices:
                if choice != present:
                    values = self._values(site.name, choice)
                    yield _Change(
                        site=site.name,
                        choice=choice,
                        saved=values[0] - saved,
                        error=values[1] - error,
                    )

    def _values(self, site: str, choice: Choice) -> tuple[float, float]:
        if choice == "keep":
            return 0.0, 0.0
        return self.cost.saved(site, choice), self.score(site, choice)

    def _changed(self, structure: SearchedStructure, change: _Change) -> SearchedStructure:
        choices = {**structure.choices, change.site: change.choice}
        return SearchedStructure.of(choices, self.sites)
