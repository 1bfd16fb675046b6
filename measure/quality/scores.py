"""Everything that can be said of a gallery's quality, as rows of results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.measure.quality import intervals
from latentforge.measure.quality.features import ImageFeatures, Network, see
from latentforge.measure.quality.metrics import Distance, compare_pairs, decibels
from latentforge.measure.results import ConfidenceInterval, Metric
from latentforge.runtime.image import MAX_PSNR

__all__ = [
    "ALONE",
    "DISTRIBUTION",
    "PAIRED",
    "ClipEncoder",
    "Gallery",
    "MetricInputs",
    "Share",
    "scores",
]

Array = NDArray[np.float32]

PAIRED = ("psnr", "ssim", "lpips", "perceptual")
DISTRIBUTION = ("fid", "kid", "cmmd")
ALONE = ("is", "clip", "colour", "retrieval")
"""Metrics that compare pairs, that compare galleries, and that take a gallery by itself."""

Gallery = Sequence[Image.Image]
Share = Callable[[Gallery, Sequence[str]], int]
"""How many of the pictures are right, by their prompts."""

_COMPARABLE = 1000  # images from which FID says something beyond this machine
_STANDARD = "inception-v3"
_SPLIT_FROM = 5000


class ClipEncoder(Network, Protocol):
    """A network that reads too."""

    def texts(self, prompts: Sequence[str]) -> Array:
        """Embeddings (n, width)."""


@dataclass(frozen=True, kw_only=True)
class MetricInputs:
    """What metrics see by; what needs one that is None cannot be asked for.

    Attributes:
        distances: by metric, ``lpips`` or ``perceptual``, with the name of its network.
        features: what FID, KID and IS take.
        gives: what that makes of a picture.
        clip: what the CLIP score and CMMD take.
        statistics: distribution.Statistics that FID compares with, in place of the reference.
        shares: by metric, ``colour`` or ``retrieval``.
        names: of networks, by metric.
    """

    distances: Mapping[str, Distance] = field(default_factory=dict)
    features: Network | None = None
    gives: ImageFeatures = field(default_factory=ImageFeatures)
    clip: ClipEncoder | None = None
    statistics: Any = None
    shares: Mapping[str, Share] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def can(self, *, reference: bool) -> list[str]:
        """The metrics that these are enough for."""
        sees = self.gives.features is not None
        able = {"psnr": reference, "ssim": reference}
        able |= {name: reference and name in self.distances for name in ("lpips", "perceptual")}
        able |= {"fid": sees and (reference or self.statistics is not None)}
        able |= {"kid": sees and reference, "cmmd": self.clip is not None and reference}
        able |= {"is": self.gives.logits is not None, "clip": self.clip is not None}
        able |= {name: name in self.shares for name in ("colour", "retrieval")}
        return [name for name, possible in able.items() if possible]


class _Subject:
    """One gallery and what the networks make of it, each looked at once."""

    def __init__(
        self, name: str, gallery: Gallery, prompts: Sequence[str], judges: MetricInputs
    ) -> None:
        self.name, self.gallery, self.prompts, self._judges = name, gallery, prompts, judges

    @cached_property
    def seen(self) -> ImageFeatures:
        assert self._judges.features is not None
        return see(self._judges.features, self.gallery)

    @property
    def features(self) -> Array:
        assert self.seen.features is not None
        return self.seen.features

    @property
    def logits(self) -> Array:
        assert self.seen.logits is not None
        return self.seen.logits

    @cached_property
    def embedded(self) -> Array:
        assert self._judges.clip is not None
        embedded = see(self._judges.clip, self.gallery).features
        assert embedded is not None
        return embedded


def scores(
    galleries: Mapping[str, Gallery],
    prompts: Sequence[str],
    judges: MetricInputs,
    *,
    metrics: Sequence[str],
    reference: str = "",
    seed: int = 0,
) -> Iterator[Metric]:
    """The metrics of every gallery, in their order; those of a gallery alone of the reference too.

    Args:
        galleries: pictures by subject, in the order of the prompts.
        prompts: one a picture.
        judges: what to see by, enough for all the metrics.
        metrics: names of PAIRED, DISTRIBUTION and ALONE.
        reference: which of the galleries the others are compared with; none if empty.
        seed: of the resampling.

    Raises:
        ShapeError: galleries of unequal size, or too few pictures for a metric.
        BackendError: a network gives NaN.
    """
    subjects = {
        name: _Subject(name, pictures, prompts, judges) for name, pictures in galleries.items()
    }
    theirs = subjects.get(reference)
    for name, ours in subjects.items():
        other = theirs if name != reference else None
        if other is not None:
            yield from _paired(ours, other, judges, metrics, seed)
        for metric in (metric for metric in metrics if metric not in PAIRED):
            by_statistics = metric == "fid" and judges.statistics is not None
            if metric in ALONE or other is not None or by_statistics:
                yield _FIGURES[metric](ours, other, judges, seed)


def _paired(
    ours: _Subject, theirs: _Subject, judges: MetricInputs, metrics: Sequence[str], seed: int
) -> Iterator[Metric]:
    wanted = [name for name in metrics if name in PAIRED]
    if not wanted:
        return
    distances = {name: d for name, d in judges.distances.items() if name in wanted}
    rows = compare_pairs(theirs.gallery, ours.gallery, distances)
    for name in (name for name in wanted if name == "psnr" or name in rows):
        yield _metric(
            name,
            ours,
            _decibels(rows["error"], seed) if name == "psnr" else _mean(rows[name], seed),
            better="higher" if name in ("psnr", "ssim") else "lower",
            unit="dB" if name == "psnr" else "",
            reference=theirs.name,
            network=judges.names.get(name, ""),
            note=_about_pairs(rows["error"]) if name == "psnr" else "",
        )


def _mean(values: NDArray[np.float64], seed: int) -> ConfidenceInterval:
    return intervals.mean(values, seed=seed)


def _decibels(errors: NDArray[np.float64], seed: int) -> ConfidenceInterval:
    """Of all pixels together: a mean over pictures in dB would be ruled by equal ones."""
    return intervals.mean(errors, scale=decibels, seed=seed)


def _about_pairs(errors: NDArray[np.float64]) -> str:
    single = decibels(errors)
    equal = int(np.sum(single >= MAX_PSNR))
    return f"worst picture {single.min():.1f} dB" + (f", {equal} equal" if equal else "")


def _fid(ours: _Subject, theirs: _Subject | None, judges: MetricInputs, seed: int) -> Metric:
    from latentforge.measure.quality.distribution import fid

    features = ours.features
    if judges.statistics is not None:
        found, name = fid(features, judges.statistics, seed=seed), "statistics"
    else:
        assert theirs is not None
        found, name = fid(features, theirs.features, paired=True, seed=seed), theirs.name
    return _seen("fid", ours, found, judges, reference=name, note=_about_fid(features, judges))


def _about_fid(features: Array, judges: MetricInputs) -> str:
    count, width = features.shape
    notes = []
    if count < _COMPARABLE:
        notes.append("under 1,000 images: cannot be compared with other people's figures")
    elif judges.features is None or judges.features.name != _STANDARD:
        notes.append("cannot be compared with figures of the standard Inception")
    if count <= width:
        notes.append(f"fewer images than the {width} features, which raises it")
    return "; ".join(notes)


def _kid(ours: _Subject, theirs: _Subject | None, judges: MetricInputs, seed: int) -> Metric:
    from latentforge.measure.quality.distribution import kid

    assert theirs is not None
    found = kid(ours.features, theirs.features, paired=True, seed=seed)
    note = "below 0 because pictures of equal seeds are alike" if found.value < 0 else ""
    return _seen("kid", ours, found, judges, reference=theirs.name, note=note)


def _cmmd(ours: _Subject, theirs: _Subject | None, judges: MetricInputs, seed: int) -> Metric:
    from latentforge.measure.quality.distribution import cmmd

    assert theirs is not None and judges.clip is not None
    found = cmmd(ours.embedded, theirs.embedded, paired=True, seed=seed)
    return _metric(
        "cmmd", ours, found, better="lower", reference=theirs.name, network=judges.clip.name
    )


def _is(ours: _Subject, theirs: _Subject | None, judges: MetricInputs, seed: int) -> Metric:
    from latentforge.measure.quality.distribution import inception_score

    found = inception_score(ours.logits, seed=seed)
    few = len(ours.gallery) < _SPLIT_FROM
    note = "under 5,000 images: not split in ten" if few else ""
    return _seen("is", ours, found, judges, better="higher", note=note)


def _clip(ours: _Subject, theirs: _Subject | None, judges: MetricInputs, seed: int) -> Metric:
    from latentforge.measure.quality.distribution import clip_score

    assert judges.clip is not None
    found = clip_score(ours.embedded, judges.clip.texts(ours.prompts), seed=seed)
    return _metric("clip", ours, found, better="higher", network=judges.clip.name)


def _colour(ours: _Subject, theirs: _Subject | None, judges: MetricInputs, seed: int) -> Metric:
    return _share("colour", ours, judges)


def _retrieval(ours: _Subject, theirs: _Subject | None, judges: MetricInputs, seed: int) -> Metric:
    return _share("retrieval", ours, judges)


def _share(name: str, ours: _Subject, judges: MetricInputs) -> Metric:
    hits = judges.shares[name](ours.gallery, ours.prompts)
    found = intervals.share(hits, len(ours.gallery))
    return _metric(name, ours, found, better="higher")


_FIGURES: Mapping[str, Callable[[_Subject, _Subject | None, MetricInputs, int], Metric]] = {
    "fid": _fid,
    "kid": _kid,
    "cmmd": _cmmd,
    "is": _is,
    "clip": _clip,
    "colour": _colour,
    "retrieval": _retrieval,
}


def _seen(
    name: str,
    ours: _Subject,
    found: ConfidenceInterval,
    judges: MetricInputs,
    *,
    better: Literal["higher", "lower"] = "lower",
    reference: str = "",
    note: str = "",
) -> Metric:
    network = judges.features.name if judges.features else ""
    return _metric(
        name, ours, found, better=better, reference=reference, network=network, note=note
    )


def _metric(
    name: str,
    ours: _Subject,
    found: ConfidenceInterval,
    *,
    better: Literal["higher", "lower"],
    **more: str,
) -> Metric:
    return Metric(
        name=name,
        subject=ours.name,
        value=found.value,
        low=found.low,
        high=found.high,
        images=len(ours.gallery),
        better=better,
        **more,
    )
