"""Greedy removal with true errors: the way to structures where sums of scores do not rank them."""

from __future__ import annotations

from collections.abc import Callable

from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.train.search.problem import Problem

__all__ = ["greedy_path"]

_CANDIDATES = 5
"""Changes whose true error is measured in each round: those of the best score for their saving."""


def greedy_path(
    problem: Problem,
    error: Callable[[SearchedStructure], float],
    go_on: Callable[[], bool],
) -> list[SearchedStructure]:
    """Return the structures on a way from the teacher to one that fits.

    In each round the change is made whose true error rises least for what it saves, given all
    changes before it (as in SnapFusion, Li et al. 2023, arXiv 2306.00980).

    Args:
        problem: the limit, and the scores that select candidates.
        error: true error of a structure.
        go_on: called before each round; the way ends where it returns False.
    """
    structure = SearchedStructure(choices={})
    path, present = [structure], error(structure)
    while not problem.fits(structure) and go_on():
        judged = [
            (max(0.0, error(changed) - present) / saved, changed)
            for changed, saved in problem.savings(structure, _CANDIDATES)
        ]
        if not judged:
            break
        _, structure = min(judged, key=lambda pair: pair[0])
        present = error(structure)
        path.append(structure)
    return path
