"""Metrics of a gallery of images, as rows of a result file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.quality import intervals
from latentforge.measure.quality.features import ImageFeatures, extract
from latentforge.measure.quality.inputs import Gallery, MetricInputs
from latentforge.measure.quality.metrics import compare_pairs, decibels
from latentforge.measure.results import ConfidenceInterval, Metric
from latentforge.runtime.image import MAX_PSNR

__all__ = ["DISTRIBUTION", "PAIRED", "SINGLE", "scores"]

Array = NDArray[np.float32]

PAIRED = ("psnr", "ssim", "lpips", "perceptual")
"""Metrics that compare images pair by pair."""

DISTRIBUTION = ("fid", "kid", "cmmd")
"""Metrics that compare two galleries as distributions."""

SINGLE = ("is", "clip", "colour", "retrieval")
"""Metrics of one gallery."""

_COMPARABLE = 1000  # images from which FID is comparable with published figures
_STANDARD = "inception-v3"
_SPLIT_FROM = 5000


class _Subject:
    """Gallery with its features, each computed once."""

    def __init__(
        self, name: str, gallery: Gallery, prompts: Sequence[str], inputs: MetricInputs
    ) -> None:
        self.name, self.gallery, self.prompts, self._inputs = name, gallery, prompts, inputs

    @cached_property
    def extracted(self) -> ImageFeatures:
        assert self._inputs.features is not None
        return extract(self._inputs.features, self.gallery)

    @property
    def features(self) -> Array:
        assert self.extracted.features is not None
        return self.extracted.features

    @property
    def logits(self) -> Array:
        assert self.extracted.logits is not None
        return self.extracted.logits

    @cached_property
    def embeddings(self) -> Array:
        assert self._inputs.clip is not None
        embeddings = extract(self._inputs.clip, self.gallery).features
        assert embeddings is not None
        return embeddings


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """One gallery, the reference if there is one, and what metrics need."""

    candidate: _Subject
    reference: _Subject | None
    inputs: MetricInputs
    seed: int

    def metric(
        self,
        name: str,
        interval: ConfidenceInterval,
        *,
        better: Literal["higher", "lower"],
        **texts: str,
    ) -> Metric:
        """Return a row of results; ``texts`` are its unit, reference, network and note."""
        return Metric(
            name=name,
            subject=self.candidate.name,
            value=interval.value,
            low=interval.low,
            high=interval.high,
            level=interval.level,
            images=len(self.candidate.gallery),
            better=better,
            **texts,
        )


def scores(
    galleries: Mapping[str, Gallery],
    prompts: Sequence[str],
    inputs: MetricInputs,
    *,
    metrics: Sequence[str],
    reference: str = "",
    seed: int = 0,
) -> Iterator[Metric]:
    """Yield the metrics of every gallery; SINGLE ones of the reference too.

    Args:
        galleries: images by subject, in the order of the prompts.
        prompts: one per image.
        inputs: enough for all the metrics.
        metrics: names of PAIRED, DISTRIBUTION and SINGLE.
        reference: name of the gallery that the others are compared with; empty for none.
        seed: of the resampling.

    Raises:
        ShapeError: galleries of unequal size, or too few images for a metric.
        BackendError: a network gives NaN.
    """
    subjects = {name: _Subject(name, images, prompts, inputs) for name, images in galleries.items()}
    for name, subject in subjects.items():
        other = subjects.get(reference) if name != reference else None
        comparison = _Comparison(candidate=subject, reference=other, inputs=inputs, seed=seed)
        if other is not None:
            yield from _paired(comparison, other, [m for m in metrics if m in PAIRED])
        for metric in (metric for metric in metrics if metric not in PAIRED):
            from_statistics = metric == "fid" and inputs.statistics is not None
            if metric in SINGLE or other is not None or from_statistics:
                yield _METRICS[metric](comparison)


def _paired(
    comparison: _Comparison, reference: _Subject, metrics: Sequence[str]
) -> Iterator[Metric]:
    if not metrics:
        return
    inputs, seed = comparison.inputs, comparison.seed
    distances = {name: d for name, d in inputs.distances.items() if name in metrics}
    rows = compare_pairs(reference.gallery, comparison.candidate.gallery, distances)
    for name in (name for name in metrics if name == "psnr" or name in rows):
        if name == "psnr":
            yield _psnr(comparison, reference, rows["error"])
            continue
        yield comparison.metric(
            name,
            intervals.mean(rows[name], seed=seed),
            better="higher" if name == "ssim" else "lower",
            reference=reference.name,
            network=inputs.names.get(name, ""),
        )


def _psnr(comparison: _Comparison, reference: _Subject, errors: NDArray[np.float64]) -> Metric:
    """Return PSNR over all pixels together: a mean in dB would be dominated by equal images."""
    single = decibels(errors)
    equal = int(np.sum(single >= MAX_PSNR))
    return comparison.metric(
        "psnr",
        intervals.mean(errors, scale=decibels, seed=comparison.seed),
        better="higher",
        unit="dB",
        reference=reference.name,
        note=f"worst image {single.min():.1f} dB" + (f", {equal} equal" if equal else ""),
    )


def _fid(comparison: _Comparison) -> Metric:
    from latentforge.measure.quality.distribution import fid

    features, statistics = comparison.candidate.features, comparison.inputs.statistics
    if statistics is not None:
        interval, name = fid(features, statistics, seed=comparison.seed), "statistics"
    else:
        reference = _reference(comparison)
        interval = fid(features, reference.features, paired=True, seed=comparison.seed)
        name = reference.name
    note = _fid_note(features, comparison.inputs)
    return comparison.metric(
        "fid", interval, better="lower", reference=name, network=_network(comparison), note=note
    )


def _fid_note(features: Array, inputs: MetricInputs) -> str:
    count, width = features.shape
    notes = []
    if count < _COMPARABLE:
        notes.append("under 1,000 images: not comparable with published figures")
    elif inputs.features is None or inputs.features.name != _STANDARD:
        notes.append("not comparable with figures of the standard Inception")
    if count <= width:
        notes.append(f"fewer images than the {width} features, which raises it")
    return "; ".join(notes)


def _kid(comparison: _Comparison) -> Metric:
    from latentforge.measure.quality.distribution import kid

    reference = _reference(comparison)
    interval = kid(
        comparison.candidate.features, reference.features, paired=True, seed=comparison.seed
    )
    return comparison.metric(
        "kid",
        interval,
        better="lower",
        reference=reference.name,
        network=_network(comparison),
        note="below 0 because images of equal seeds are alike" if interval.value < 0 else "",
    )


def _cmmd(comparison: _Comparison) -> Metric:
    from latentforge.measure.quality.distribution import cmmd

    reference, clip = _reference(comparison), comparison.inputs.clip
    assert clip is not None
    interval = cmmd(
        comparison.candidate.embeddings, reference.embeddings, paired=True, seed=comparison.seed
    )
    return comparison.metric(
        "cmmd", interval, better="lower", reference=reference.name, network=clip.name
    )


def _is(comparison: _Comparison) -> Metric:
    from latentforge.measure.quality.distribution import inception_score

    few = len(comparison.candidate.gallery) < _SPLIT_FROM
    return comparison.metric(
        "is",
        inception_score(comparison.candidate.logits, seed=comparison.seed),
        better="higher",
        network=_network(comparison),
        note="under 5,000 images: not split in ten" if few else "",
    )


def _clip(comparison: _Comparison) -> Metric:
    from latentforge.measure.quality.distribution import clip_score

    candidate, clip = comparison.candidate, comparison.inputs.clip
    assert clip is not None
    interval = clip_score(candidate.embeddings, clip.texts(candidate.prompts), seed=comparison.seed)
    return comparison.metric("clip", interval, better="higher", network=clip.name)


def _colour(comparison: _Comparison) -> Metric:
    return _accuracy("colour", comparison)


def _retrieval(comparison: _Comparison) -> Metric:
    return _accuracy("retrieval", comparison)


def _accuracy(name: str, comparison: _Comparison) -> Metric:
    candidate = comparison.candidate
    correct = comparison.inputs.accuracies[name](candidate.gallery, candidate.prompts)
    interval = intervals.proportion(correct, len(candidate.gallery))
    return comparison.metric(name, interval, better="higher")


_METRICS: Mapping[str, Callable[[_Comparison], Metric]] = {
    "fid": _fid,
    "kid": _kid,
    "cmmd": _cmmd,
    "is": _is,
    "clip": _clip,
    "colour": _colour,
    "retrieval": _retrieval,
}


def _reference(comparison: _Comparison) -> _Subject:
    assert comparison.reference is not None
    return comparison.reference


def _network(comparison: _Comparison) -> str:
    return comparison.inputs.features.name if comparison.inputs.features else ""
