"""Evolution of structures by their true errors, which repairs what sums of scores misjudge.

As in Once-for-All (Cai et al. 2020, arXiv 1908.09791), parents are crossed and mutated within the
limit of the cost. The first generation is the knapsack's, so that a small population is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numpy.random import Generator

from latentforge.export.models.searched_structure import Choice, SearchedStructure
from latentforge.train.search.problem import Problem

__all__ = ["EvolutionSettings", "evolve"]

_CROSSED = 0.5  # share of the children with two parents
_TRIES = 20  # for each child, to be a new structure that fits


@dataclass(frozen=True, kw_only=True)
class EvolutionSettings:
    """Size of an evolution.

    Attributes:
        population: structures of a generation.
        generations: of children.
        mutations: sites of a child that change at random, on average.
    """

    population: int = 16
    generations: int = 6
    mutations: float = 1.5

    @property
    def evaluations(self) -> int:
        """Errors that are measured, at most, beside those of the first structures."""
        return self.population * self.generations


def evolve(
    problem: Problem,
    first: Sequence[SearchedStructure],
    error: Callable[[SearchedStructure], float],
    random: Generator,
    settings: EvolutionSettings,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[SearchedStructure, float]:
    """Return the true errors of all structures of all generations, the best first.

    Args:
        problem: the limit and the scores that guide repairs.
        first: structures that fit, one or more.
        error: true error of a structure.
        random: source of all choices.
        settings: size.
        go_on: called before each measurement; the evolution ends when it returns False.
    """
    judged: dict[SearchedStructure, float] = {}

    def judge(structures: Sequence[SearchedStructure]) -> None:
        for structure in structures:
            if structure not in judged and (not judged or go_on()):
                judged[structure] = error(structure)

    judge(first)
    for _ in range(settings.generations):
        if not go_on():
            break
        best = sorted(judged, key=judged.__getitem__)[: settings.population]
        judge(_children(problem, best, judged, random, settings))
    return dict(sorted(judged.items(), key=lambda item: item[1]))


def _children(
    problem: Problem,
    parents: Sequence[SearchedStructure],
    judged: dict[SearchedStructure, float],
    random: Generator,
    settings: EvolutionSettings,
) -> list[SearchedStructure]:
    """Return new structures that fit, as many as a population has if that many are found."""
    children: dict[SearchedStructure, None] = {}
    for _ in range(_TRIES * settings.population):
        if len(children) == settings.population:
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
