"""Evolution of structures by their true errors, which repairs what sums of scores misjudge.

As in Once-for-All (Cai et al. 2020, arXiv 1908.09791), parents are crossed and mutated within the
limit of the cost. Parents are the best of all structures whose error is known, the knapsack's,
random ones and baselines, so that a small population is enough. Some children have stricter limits,
as sums are the worse the more is left out, and the front is searched and shown there too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from numpy.random import Generator

from latentforge.export.models.searched_structure import Choice, SearchedStructure
from latentforge.train.search.problem import Problem

__all__ = ["CURVE", "EvolutionSettings", "best_within", "evolve"]

CURVE = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Ratios of the teacher's cost to other limits, at which structures are shown."""

_CROSSED = 0.5  # share of the children with two parents
_TRIES = 20  # for each child, to be a new structure that fits


@dataclass(frozen=True, kw_only=True)
class EvolutionSettings:
    """Size of an evolution.

    Attributes:
        population: structures of a generation.
        generations: of children.
        mutations: sites of a child that change at random, on average.
        others: structures of a generation whose limits are those of CURVE beyond the goal.
    """

    population: int = 16
    generations: int = 6
    mutations: float = 1.5
    others: int = 6

    @property
    def evaluations(self) -> int:
        """Errors that are measured, at most."""
        return self.population * self.generations


def evolve(
    problem: Problem,
    first: Mapping[SearchedStructure, float],
    error: Callable[[SearchedStructure], float],
    random: Generator,
    settings: EvolutionSettings,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[SearchedStructure, float]:
    """Return the true errors of all first structures and of their descendants.

    Args:
        problem: the limit that most children just fit, and the scores that guide repairs.
        first: errors of the structures at the beginning, whatever they cost.
        error: true error of a structure.
        random: source of all choices.
        settings: size.
        go_on: called before each measurement; the evolution ends when it returns False.
    """
    judged = dict(first)
    for _ in range(settings.generations):
        for child in _generation(problem, judged, random, settings):
            if not go_on():
                return judged
            judged[child] = error(child)
    return judged


def best_within(
    problem: Problem, judged: Mapping[SearchedStructure, float]
) -> list[SearchedStructure]:
    """Return the structures that fit, those of the least error first."""
    return sorted((s for s in judged if problem.fits(s)), key=judged.__getitem__)


def _generation(
    problem: Problem,
    judged: Mapping[SearchedStructure, float],
    random: Generator,
    settings: EvolutionSettings,
) -> list[SearchedStructure]:
    """Return children that just fit, and some that just fit limits beyond."""
    beyond = [p for p in _beyond(problem) if best_within(p, judged)]
    others = settings.others if beyond else 0
    counts = Counter(beyond[index % len(beyond)].limit for index in range(others))
    counts[problem.limit] = settings.population - others
    children: list[SearchedStructure] = []
    for limit, count in counts.items():
        children += _children(replace(problem, limit=limit), judged, random, settings, count)
    return list(dict.fromkeys(children))


def _beyond(problem: Problem) -> Iterator[Problem]:
    """Yield the problem with each limit of CURVE that is stricter than its own."""
    for ratio in CURVE:
        if (limit := problem.cost.whole / ratio) < problem.limit:
            yield replace(problem, limit=limit)


def _children(
    problem: Problem,
    judged: Mapping[SearchedStructure, float],
    random: Generator,
    settings: EvolutionSettings,
    count: int,
) -> list[SearchedStructure]:
    """Return new structures that fit, so many if that many are found."""
    parents = best_within(problem, judged)[: settings.population]
    children: dict[SearchedStructure, None] = {}
    for _ in range(_TRIES * count if parents else 0):
        if len(children) == count:
            break
        mother, father = (parents[int(i)] for i in random.integers(len(parents), size=2))
        choices = dict(mother.choices)
        if random.random() < _CROSSED:
            choices = _crossed(problem, mother, father, random)
        _mutate(problem, choices, random, settings.mutations)
        child = problem.repaired(choices, random)
        if child is not None and child not in judged:
            children[child] = None
    return list(children)


def _crossed(
    problem: Problem, mother: SearchedStructure, father: SearchedStructure, random: Generator
) -> dict[str, Choice]:
    """Return the choice of either parent at each site."""
    sides = random.random(len(problem.sites)) < 0.5
    return {
        site.name: (mother if side else father).choice(site.name)
        for site, side in zip(problem.sites, sides, strict=True)
    }


def _mutate(
    problem: Problem, choices: dict[str, Choice], random: Generator, mutations: float
) -> None:
    """Change some sites at random, in place."""
    chances = random.random(len(problem.sites)) < mutations / len(problem.sites)
    for site, changes in zip(problem.sites, chances, strict=True):
        if changes:
            choices[site.name] = site.choices[int(random.integers(len(site.choices)))]
