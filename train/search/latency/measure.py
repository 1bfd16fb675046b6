"""Structures whose latency is measured, and their measurement.

They are random. Each tells something about every part that it leaves out, and of measurements of
equal noise those of many parts at once tell most (weighing designs: Hotelling 1944, Some
improvements in weighing and other experimental techniques). One part alone would save hardly more
time than two measurements of the same engine differ by. Others are held out to check the
prediction.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from latentforge.export.models.searched_structure import SearchedStructure, Site
from latentforge.runtime.progress import Progress
from latentforge.train.search.latency.table import LatencyTable
from latentforge.train.search.variants import Variants

__all__ = ["LatencyPlan", "count_costs", "measure_plan", "random_structures"]

_ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """Structures to measure.

    Attributes:
        fitted: random ones that the model is fitted to.
        held_out: random ones that it is judged by.
    """

    fitted: tuple[SearchedStructure, ...]
    held_out: tuple[SearchedStructure, ...]

    @classmethod
    def of(
        cls, variants: Variants, *, fitted: int = 40, held_out: int = 20, seed: int = 0
    ) -> "LatencyPlan":
        """Plan the measurement of a UNet with so many random structures."""
        structures = random_structures(variants.sites, fitted + held_out, seed)
        return cls(
            fitted=structures[held_out:],
            held_out=structures[:held_out],
        )

    def with_fitted(self, structures: Iterable[SearchedStructure]) -> "LatencyPlan":
        """Return the plan with further structures to fit to, unless it has them already."""
        known = dict.fromkeys(self.structures)
        new = [s for s in dict.fromkeys(structures) if s.choices and s not in known]
        return replace(self, fitted=(*self.fitted, *new))

    @property
    def structures(self) -> tuple[SearchedStructure, ...]:
        """All of them."""
        return (*self.held_out, *self.fitted)


def measure_plan(
    variants: Variants,
    plan: LatencyPlan,
    table: LatencyTable,
    *,
    repeats: int,
    progress: Progress,
) -> None:
    """Measure the structures of a plan that the table does not have yet.

    Args:
        variants: the engines.
        plan: the structures.
        table: of the engines' setting; it keeps each latency as soon as it is measured.
        repeats: turns of each structure and the whole UNet.
        progress: counts a part for each measurement.
    """
    for structure in plan.structures:
        if structure not in table:
            with progress.part(f"latency {len(table) + 1}"):
                variants.measure([structure], repeats=repeats, report=table.add)


def count_costs(variants: Variants) -> int:
    """Return the number of choices whose costs differ: sites of equal layers share theirs."""
    signatures = variants.signatures
    return len({(signatures[s.name], choice) for s in variants.sites for choice in s.choices[1:]})


def random_structures(
    sites: Sequence[Site], count: int, seed: int
) -> tuple[SearchedStructure, ...]:
    """Return different random structures, from hardly smaller than the whole one to the smallest.

    There are fewer than ``count`` if the UNet has few structures.
    """
    source, found = random.Random(seed), dict[SearchedStructure, None]()
    for _ in range(_ATTEMPTS * count):
        if len(found) == count:
            break
        share, dropped = source.uniform(0.05, 0.95), source.random()
        choices = {
            site.name: site.choices[-1]
            if source.random() < dropped
            else source.choice(site.choices[1:])
            for site in sites
            if source.random() < (share if site.kind != "stage" else share / 2)
        }
        structure = SearchedStructure.of(choices, sites)
        if structure.choices and structure.is_valid(sites):
            found[structure] = None
    return tuple(found)
