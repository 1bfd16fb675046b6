"""Structures to compare a search with: published ones, uniform pruning, and random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from numpy.random import Generator

from latentforge.export.models.searched_structure import Choice, SearchedStructure, Site
from latentforge.train.search.problem import Problem

__all__ = [
    "Baseline",
    "list_baselines",
    "published_structures",
    "random_structure",
    "uniform_structure",
]

_RESNETS = {"down_blocks": (2, 2, 1), "up_blocks": (3, 3, 2)}
_ATTENTIONS = {
    "1.0": {"down_blocks": (0, 1, 3), "up_blocks": (0, 3, 6)},
    "2.0": {"down_blocks": (0, 1, 3), "up_blocks": (0, 3, 5)},
}
"""Counts of DeciDiffusion's UNets by level, from the outermost."""

_RANDOM = 8  # random structures, of which the best is a baseline


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Named structure to compare with."""

    name: str
    structure: SearchedStructure


def published_structures(sites: Sequence[Site]) -> Iterator[Baseline]:
    """Yield the published structures that differ from the teacher and from each other.

    BK-SDM (Kim et al. 2023, arXiv 2305.15798) drops the second pair of resnet and attention of each
    block; small also the mid block, and tiny also the innermost level. DeciDiffusion's have its
    numbers of resnets and attentions on each level, where the teacher has as many; 2.0 has no mid
    block and no innermost level.
    """
    second = _dropped(sites, lambda site: _index(site) == 1 and site.block != "mid_block")
    mid = _dropped(sites, lambda site: site.block == "mid_block")
    stage = _dropped(sites, lambda site: site.kind == "stage")
    named: Mapping[str, Mapping[str, Choice]] = {
        "BK-SDM base": second,
        "BK-SDM small": {**second, **mid},
        "BK-SDM tiny": {**second, **mid, **stage} if stage else {},
        "DeciDiffusion 1.0": _decidiffusion(sites, "1.0"),
        "DeciDiffusion 2.0": {**_decidiffusion(sites, "2.0"), **mid, **stage},
    }
    seen = {SearchedStructure(choices={})}
    for name, choices in named.items():
        structure = SearchedStructure.of(choices, sites)
        if structure not in seen and structure.is_valid(sites):
            seen.add(structure)
            yield Baseline(name=name, structure=structure)


def uniform_structure(problem: Problem) -> SearchedStructure | None:
    """Return the first structure that fits as sites are pruned evenly, in no order of importance.

    They are halved, one after the other and evenly spread over the depth; then dropped likewise.
    None if none fits.
    """
    choices: dict[str, Choice] = {}
    sites = [site for site in problem.sites if site.kind != "stage"]
    order = sorted(range(len(sites)), key=_spread)
    choice: Choice
    for choice in ("half", "drop"):
        for site in (sites[index] for index in order):
            if choice in site.choices:
                choices[site.name] = choice
            structure = SearchedStructure.of(choices, problem.sites)
            if problem.fits(structure):
                return structure
    return None


def random_structure(problem: Problem, random: Generator) -> SearchedStructure | None:
    """Return the first structure that fits as sites are pruned in random order; None if none.

    The choice is random too; if none fits when all sites have one, it becomes that of the most.
    """
    choices: dict[str, Choice] = {}
    sites = [problem.sites[int(index)] for index in random.permutation(len(problem.sites))]
    drawn = [site.choices[int(random.integers(1, len(site.choices)))] for site in sites]
    last = [site.choices[-1] for site in sites]
    for site, choice in (*zip(sites, drawn, strict=True), *zip(sites, last, strict=True)):
        choices[site.name] = choice
        structure = SearchedStructure.of(choices, problem.sites)
        if problem.fits(structure):
            return structure
    return None


def list_baselines(
    problem: Problem, error: Callable[[SearchedStructure], float], random: Generator
) -> tuple[Baseline, ...]:
    """Return published structures, and uniform and random pruning to the limit.

    Args:
        problem: the limit, and the sites.
        error: true error of a structure, by which the best random one is taken.
        random: source of the random ones.
    """
    found = [*published_structures(problem.sites)]
    if (uniform := uniform_structure(problem)) is not None:
        found.append(Baseline(name="uniform pruning", structure=uniform))
    draws = (random_structure(problem, random) for _ in range(_RANDOM))
    if drawn := [structure for structure in draws if structure is not None]:
        name = f"best of {len(drawn)} random"
        found.append(Baseline(name=name, structure=min(drawn, key=error)))
    return tuple(found)


def _spread(index: int) -> float:
    """Return the radical inverse of an index in base 2, whose order is even over all indices."""
    value, part = 0.0, 0.5
    while index:
        value, part, index = value + part * (index & 1), part / 2, index >> 1
    return value


def _dropped(sites: Sequence[Site], wanted: Callable[[Site], bool]) -> dict[str, Choice]:
    """Return "drop" at the sites that are wanted and offer it."""
    return {site.name: "drop" for site in sites if "drop" in site.choices and wanted(site)}


def _index(site: Site) -> int:
    """Return the place of a resnet, or of a transformer block's attention, in its block."""
    names = site.name.removeprefix(f"{site.block}.").split(".")
    return int(names[1]) if len(names) > 1 else 0


def _decidiffusion(sites: Sequence[Site], version: str) -> dict[str, Choice]:
    blocks = {site.block for site in sites if site.kind != "stage"}
    levels = sum(block.startswith("down_blocks") for block in blocks)
    inner = {name for site in sites for name in site.covers}

    def exceeds(site: Site) -> bool:
        kind, _, number = site.block.partition(".")
        if not number or site.kind == "stage" or site.name in inner:
            return False
        level = int(number) if kind == "down_blocks" else levels - 1 - int(number)
        counts = (_RESNETS if site.kind == "resnet" else _ATTENTIONS[version])[kind]
        return _index(site) >= counts[min(level, len(counts) - 1)]

    return _dropped(sites, exceeds)
