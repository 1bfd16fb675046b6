"""Exact choice of structures for every budget: a knapsack with one choice at each site.

Costs and errors are taken to be sums over the sites. Then the structure of the least error that
saves a given cost is a multiple-choice knapsack, and one pass over the sites solves it for all
budgets (Kellerer, Pferschy & Pisinger, Knapsack Problems, 2004, section 11.5). A stage, which
covers other sites, makes a case of its own: one pass without it, and one in which it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentforge.export.models.searched_structure import Choice, SearchedStructure, Site

__all__ = ["FrontPoint", "SiteValue", "pareto_front"]

SiteValue = Callable[[str, Choice], float]
"""Cost that a choice at a site saves, or error that it makes, alone."""

_UNITS = 4096
"""Units that the largest saving is counted in, rounded down for each choice."""


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """Structure on the Pareto front: no other saves as much with less error.

    Attributes:
        structure: the choices.
        saved: sum of what they save.
        error: sum of their errors.
    """

    structure: SearchedStructure
    saved: float
    error: float


@dataclass(frozen=True, kw_only=True)
class _Option:
    """Choice at a site; ``prompted`` is True if cross-attention remains there."""

    site: str
    choice: Choice
    saved: float
    error: float
    prompted: bool


def pareto_front(sites: Sequence[Site], saved: SiteValue, error: SiteValue) -> list[FrontPoint]:
    """Return all structures on the front of sums, the teacher first, by rising saving.

    At least one cross-attention remains in each of them.

    Args:
        sites: of the teacher.
        saved: cost that a choice saves, in any unit. A choice that saves nothing is not taken.
        error: error of a choice.
    """
    points = [_point(chosen) for case in _cases(sites, saved, error) for chosen in _solve(case)]
    return _front(points)


def _cases(
    sites: Sequence[Site], saved: SiteValue, error: SiteValue
) -> Iterator[list[list[_Option]]]:
    """Yield the options by site without any stage dropped, then for each stage that may be."""
    small = [site for site in sites if site.kind != "stage"]
    groups = {site.name: _options(site, saved, error) for site in small}
    yield list(groups.values())
    for stage in (site for site in sites if site.kind == "stage"):
        others = [options for name, options in groups.items() if name not in stage.covers]
        dropped = _option(stage, "drop", saved, error)
        if dropped.saved > 0:
            yield [[dropped], *others]


def _options(site: Site, saved: SiteValue, error: SiteValue) -> list[_Option]:
    """Return the choices of a site that no other dominates; "keep" is always one."""
    options = [_option(site, choice, saved, error) for choice in site.choices]
    useful = sorted((o for o in options if o.saved > 0), key=lambda o: (o.error, -o.saved))
    kept = [next(o for o in options if o.choice == "keep")]
    for option in useful:
        best = max((o.saved for o in kept if o.prompted or not option.prompted), default=0.0)
        if option.saved > best:
            kept.append(option)
    return kept


def _option(site: Site, choice: Choice, saved: SiteValue, error: SiteValue) -> _Option:
    kept = choice == "keep"
    return _Option(
        site=site.name,
        choice=choice,
        saved=0.0 if kept else saved(site.name, choice),
        error=0.0 if kept else max(0.0, error(site.name, choice)),
        prompted=site.kind == "transformer_block" and choice != "drop",
    )


def _solve(groups: Sequence[Sequence[_Option]]) -> Iterator[list[_Option]]:
    """Yield the choice of options with the least error for every saving, in units."""
    unit = sum(max(o.saved for o in options) for options in groups) / _UNITS or 1.0
    best = np.full((2, _UNITS + 1), np.inf)  # by: cross-attention remains; saving in units
    best[0, 0] = 0.0
    picks: list[NDArray[np.int16]] = []
    for options in groups:
        best, pick = _add_group(best, options, unit)
        picks.append(pick)
    least = np.inf
    for units in range(_UNITS, -1, -1):
        if best[1, units] < least:
            least = float(best[1, units])
            yield _trace(groups, picks, unit, units)


def _add_group(
    best: NDArray[np.float64], options: Sequence[_Option], unit: float
) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
    """Return the least errors with one more site, and the option and former row of each."""
    after, pick = np.full_like(best, np.inf), np.zeros(best.shape, np.int16)
    for index, option in enumerate(options):
        shift = int(option.saved / unit)
        for row in (0, 1):
            target = row | option.prompted
            candidate = np.full(best.shape[1], np.inf)
            candidate[shift:] = best[row, : best.shape[1] - shift] + option.error
            better = candidate < after[target]
            after[target][better] = candidate[better]
            pick[target][better] = 2 * index + row
    return after, pick


def _trace(
    groups: Sequence[Sequence[_Option]],
    picks: Sequence[NDArray[np.int16]],
    unit: float,
    units: int,
) -> list[_Option]:
    """Return the options that lead to a saving with cross-attention."""
    row, chosen = 1, list[_Option]()
    for options, pick in zip(reversed(groups), reversed(picks), strict=True):
        index, row_before = divmod(int(pick[row, units]), 2)
        chosen.append(options[index])
        units, row = units - int(options[index].saved / unit), row_before
    return chosen


def _point(chosen: Sequence[_Option]) -> FrontPoint:
    choices: Mapping[str, Choice] = {o.site: o.choice for o in chosen if o.choice != "keep"}
    return FrontPoint(
        structure=SearchedStructure(choices=choices),
        saved=sum(o.saved for o in chosen),
        error=sum(o.error for o in chosen),
    )


def _front(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """Return the points that no other dominates, by rising saving."""
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (-p.saved, p.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept[::-1]
