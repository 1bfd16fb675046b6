"""Comparison of a search with other structures, each at equal measured latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.measure.quality.intervals import mean
from latentforge.measure.quality.metrics import decibels
from latentforge.measure.results import ConfidenceInterval
from latentforge.train.search.baselines import Baseline
from latentforge.train.search.evolution import CURVE
from latentforge.train.search.problem import Problem
from latentforge.train.search.search_record import EqualLatencyPair, Kind, SearchPoint
from latentforge.train.search.student_images import ImageErrors, error_ratio
from latentforge.train.search.student_selection import Selection
from latentforge.train.search.variants import WHOLE

__all__ = ["StructureComparison"]

_STUDENT = "student"
_TRIES = 3  # structures that are timed to find one within a baseline's latency
_MARGIN = 0.985  # of a baseline's latency, that the first of them is predicted to have


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Structure with a name and a role on the page."""

    name: str
    kind: Kind
    structure: SearchedStructure


class StructureComparison:
    """Structures beside the student of a selection, which has been chosen.

    Attributes:
        compared: the teacher, the student, others of the search, and baselines.
        images: by name, once draw() has run.
    """

    def __init__(
        self, problem: Problem, selection: Selection, baselines: Sequence[Baseline]
    ) -> None:
        """Time the baselines, and a structure of the search for each, while there is time."""
        self._problem, self._selection = problem, selection
        self.images: dict[str, ImageErrors] = {}
        curve = [*self._curve()]
        structures = [*(b.structure for b in baselines), *curve]
        selection.time(structures, "latencies", optional=True)
        timed = [b for b in baselines if b.structure in selection.latencies]
        matched = {b.name: self._matched(b) for b in timed}
        others = sorted({*curve, *matched.values()} - {selection.chosen}, key=problem.cost.total)
        names = self._names([selection.chosen, *reversed(others)])
        self._pairs = {baseline: names[found] for baseline, found in matched.items()}
        self.compared = (
            _Compared(name="teacher", kind="teacher", structure=WHOLE),
            *(
                _Compared(name=n, kind="searched" if n != _STUDENT else "chosen", structure=s)
                for s, n in names.items()
            ),
            *(_Compared(name=b.name, kind="baseline", structure=b.structure) for b in baselines),
        )

    @property
    def points(self) -> tuple[SearchPoint, ...]:
        """Figures of all structures."""
        return tuple(self._point(each) for each in self.compared)

    @property
    def matches(self) -> tuple[EqualLatencyPair, ...]:
        """Baselines beside the search's best within their measured latency."""
        return tuple(
            EqualLatencyPair(
                baseline=baseline,
                searched=found,
                latents=self._ratio(baseline, found, "latents"),
                pixels=self._ratio(baseline, found, "pixels"),
            )
            for baseline, found in self._pairs.items()
        )

    @property
    def shown(self) -> Mapping[str, Sequence[Image.Image]]:
        """Images by name: of the teacher, the student, the baselines, and their matches."""
        matched = self._pairs.values()
        shown = [c for c in self.compared if c.kind != "searched" or c.name in matched]
        names = [each.name for each in shown]
        return {name: self.images[name].images for name in names if name in self.images}

    def draw(self, images: Callable[[SearchedStructure], ImageErrors]) -> None:
        """Draw images of every structure that was timed."""
        timed = [c for c in self.compared if c.structure in (*self._selection.latencies, WHOLE)]
        drawn: dict[SearchedStructure, ImageErrors] = {}
        for index, each in enumerate(timed):
            if each.structure not in drawn:
                drawn[each.structure] = images(each.structure)
            self.images[each.name] = drawn[each.structure]
            self._selection.progress.within("images", index + 1, len(timed))

    def _names(self, found: Sequence[SearchedStructure]) -> dict[SearchedStructure, str]:
        """Return a name for each structure of the search, by its speedup."""
        names: dict[SearchedStructure, str] = {}
        for structure in found:
            latency = self._selection.latencies.get(structure)
            whole, cost = self._problem.cost.whole, self._problem.cost.total(structure)
            name = f"predicted {whole / cost:.2f}x"
            if latency is not None:
                name = f"search {1 / latency.ratio.value:.2f}x"
            if structure == self._selection.chosen:
                name = _STUDENT
            equal = sum(each.partition(" (")[0] == name for each in names.values())
            names[structure] = f"{name} ({equal + 1})" if equal else name
        return names

    def _curve(self) -> Iterator[SearchedStructure]:
        """Yield structures of the front at other ratios of the cost."""
        for ratio in CURVE:
            best = next(iter(self._selection.within(self._problem.cost.whole / ratio)), None)
            if best is not None and best not in (self._selection.chosen, WHOLE):
                yield best

    def _matched(self, baseline: Baseline) -> SearchedStructure:
        """Return the structure of the least error within a baseline's measured latency.

        It is the baseline itself if nothing that was timed is better.
        """
        selection = self._selection
        ratio = selection.latencies[baseline.structure].ratio.value
        limit = ratio * self._problem.cost.whole * _MARGIN
        for _ in range(_TRIES):
            best = next(iter(selection.within(limit)), WHOLE)
            if best == WHOLE:
                break
            selection.time([best], "latencies at equal speed", optional=True)
            if best not in selection.latencies or selection.latencies[best].ratio.value <= ratio:
                break
            limit *= min(0.97, ratio / selection.latencies[best].ratio.value)
        within = (s for s, latency in selection.latencies.items() if latency.ratio.value <= ratio)
        return min(within, key=selection.errors)

    def _ratio(self, baseline: str, found: str, field: str) -> ConfidenceInterval | None:
        """Return the search's error of an image relative to a baseline's."""
        first, second = self.images.get(found), self.images.get(baseline)
        if first is None or second is None:
            return None
        return error_ratio(getattr(first, field), getattr(second, field))

    def _point(self, each: _Compared) -> SearchPoint:
        selection, images = self._selection, self.images.get(each.name)
        cost, latency = self._problem.cost, selection.latencies.get(each.structure)
        whole = selection.latencies[selection.chosen].whole if selection.latencies else None
        measured = whole if each.structure == WHOLE else None
        if latency is not None and whole is not None:
            measured = whole * latency.ratio.value
        return SearchPoint(
            name=each.name,
            kind=each.kind,
            choices=each.structure.choices,
            error=selection.errors(each.structure),
            cost=cost.total(each.structure),
            measured=measured,
            speedup=None if latency is None else _inverse(latency.ratio),
            parameters=selection.errors.parameters(each.structure),
            latents=None if images is None else mean(images.latents),
            psnr=None if images is None else mean(images.pixels, scale=decibels),
        )


def _inverse(ratio: ConfidenceInterval) -> ConfidenceInterval:
    """Return the speedup of a ratio of times."""
    low, high = (None if bound is None else 1 / bound for bound in (ratio.high, ratio.low))
    return ConfidenceInterval(value=1 / ratio.value, low=low, high=high, level=ratio.level)
