"""Measured latencies of a UNet's structures, and the model that is fitted to them."""

from collections.abc import Sequence
from functools import cached_property

from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.runtime.progress import Progress
from latentforge.train.search.latency.measure import LatencyPlan, measure_plan
from latentforge.train.search.latency.model import LatencyModel, fit_latency
from latentforge.train.search.latency.table import LatencyTable
from latentforge.train.search.variants import Variants

__all__ = ["LatencyStudy"]


class LatencyStudy:
    """Latency model of a UNet, which structures join that the model itself finds best."""

    def __init__(self, variants: Variants, table: LatencyTable, *, repeats: int) -> None:
        """Bind engines.

        Args:
            variants: the engines.
            table: of their latencies.
            repeats: turns of each structure; see Variants.measure().
        """
        self._variants, self._table, self._repeats = variants, table, repeats
        self._plan = LatencyPlan(fitted=(), held_out=())

    @cached_property
    def model(self) -> LatencyModel:
        """Model fitted to what was measured, judged by what was held out."""
        variants = self._variants
        return fit_latency(self._table, self._plan, variants.sites, variants.signatures)

    def missing(self, plan: LatencyPlan) -> int:
        """Return how many structures of a plan the table lacks."""
        return sum(structure not in self._table for structure in plan.structures)

    def measure(self, plan: LatencyPlan, progress: Progress) -> None:
        """Measure what the table lacks of a plan, which the model is then fitted to."""
        measure_plan(self._variants, plan, self._table, repeats=self._repeats, progress=progress)
        self._plan = plan
        vars(self).pop("model", None)

    def with_fitted(self, structures: Sequence[SearchedStructure]) -> LatencyPlan:
        """Return the plan with further structures to fit to, none of those that are held out."""
        return self._plan.with_fitted(structures)
