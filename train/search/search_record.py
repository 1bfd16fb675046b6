"""Record of a search, which its page is drawn from: ``search.json`` in the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, Literal

from latentforge.export.models.searched_structure import Choice
from latentforge.measure.results import ConfidenceInterval
from latentforge.measure.statistics import spearman
from latentforge.runtime.record import Record

__all__ = ["Kind", "EqualLatencyPair", "ModelCheck", "SearchPoint", "SearchRecord"]


Kind = Literal["teacher", "chosen", "searched", "baseline"]


class SearchPoint(Record, frozen=True, kw_only=True):
    """Structure that was compared.

    Attributes:
        name: on the page.
        kind: teacher, the chosen student, another one of the search, or a baseline.
        choices: of the structure, by site.
        error: true error over the states, see States.error().
        cost: predicted by the goal: seconds of a step, parameters or bytes.
        measured: seconds of a step, by the ratio to the teacher in paired turns: times at
            different times are no comparison. None if it was not timed.
        speedup: measured in pairs with the teacher.
        parameters: of the UNet.
        latents: squared error of final latents, relative to the teacher's, over images of equal
            prompts and seeds. None if none were drawn.
        psnr: of the images, in dB.
    """

    name: str
    kind: Kind
    choices: Mapping[str, Choice]
    error: float
    cost: float
    measured: float | None = None
    speedup: ConfidenceInterval | None = None
    parameters: int
    latents: ConfidenceInterval | None = None
    psnr: ConfidenceInterval | None = None


class EqualLatencyPair(Record, frozen=True, kw_only=True):
    """Baseline beside the search's best structure within its measured latency.

    Attributes:
        baseline: name of the point.
        searched: name of the point.
        latents: error of the latents relative to the baseline's, over the same prompts and seeds;
            below 1 the search is nearer to the teacher. None if no images were drawn.
        pixels: the same of the images' pixels.
    """

    baseline: str
    searched: str
    latents: ConfidenceInterval | None
    pixels: ConfidenceInterval | None


class ModelCheck(Record, frozen=True, kw_only=True):
    """Predictions of a model beside what was measured, on structures that it was not fitted to.

    Attributes:
        points: of each structure: predicted and measured.
        spearman: rank correlation.
        mean_error: mean of the relative errors.
        note: how far it holds, in words.
    """

    points: tuple[tuple[float, float], ...]
    spearman: float
    mean_error: float
    note: str

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], note: str) -> ModelCheck:
        """Return the check of (predicted, measured) pairs."""
        ratios = [abs(predicted / measured - 1) for predicted, measured in points if measured]
        return cls(
            points=tuple(points),
            spearman=spearman([a for a, _ in points], [b for _, b in points]),
            mean_error=mean(ratios) if ratios else 0.0,
            note=note,
        )


class SearchRecord(Record, frozen=True, kw_only=True):
    """Everything that a search found.

    Attributes:
        checkpoint: the teacher, as the user named it.
        sha256: of its UNet's weights.
        request: goal and means.
        setting: at which latency was measured, such as target, size, rows and threads.
        machine: where.
        states: number of states, and their rows and size in words.
        points: the teacher first, then the chosen student.
        matches: comparisons at equal measured latency.
        images: number of images that structures were compared on; 0 if there was no time.
        latency: check of the latency model; None if the goal needs none.
        errors: check of sums of scores.
        words: structure of the chosen student.
        seconds: of this run.
    """

    checkpoint: str
    sha256: str
    request: Mapping[str, Any]
    setting: Mapping[str, Any]
    machine: Mapping[str, str]
    states: str
    points: tuple[SearchPoint, ...]
    matches: tuple[EqualLatencyPair, ...]
    images: int
    latency: ModelCheck | None
    errors: ModelCheck
    words: str
    seconds: float

    @property
    def chosen(self) -> SearchPoint:
        """The student."""
        return next(point for point in self.points if point.kind == "chosen")
