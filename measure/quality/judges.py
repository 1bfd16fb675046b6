"""What an evaluation is asked, and the judges that it takes: networks, statistics, shares."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.quality.catalogue import METRICS
from latentforge.measure.quality.features import ImageFeatures, Network, OnnxNetwork
from latentforge.measure.quality.metrics import Distance, Lpips, Perceptual
from latentforge.measure.quality.path_length import path_length
from latentforge.measure.quality.scores import DISTRIBUTION, MetricInputs
from latentforge.measure.results import Metric
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.settings import Request, Settings

__all__ = ["Evaluation", "distance_of", "load_metric_inputs", "metrics_of", "path_metric"]

_MOST = 100_000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to judge by, and on what.

    Attributes:
        against: a checkpoint, whose pictures diffusers draws, or an engine directory; None for
            metrics that need no reference.
        prompts: a text file, one a line, or MLPerf's .tsv; the demo's own or those that come with
            the package if None.
        metrics: names of METRICS; all that can be had if empty, but ppl.
        images: how many of each; as many as the file has prompts, or 64, if None.
        seed: of the first image; every further one has the next.
        request: further settings of every image; the first engines' defaults fill in the rest.
            Engines with a plan follow it, unless the request is to be exact.
        network: efficientnet-lite0, or an ONNX file: see measure.quality.features.OnnxNetwork.
        inception: the standard Inception's weights: FID, KID and IS use it in place of network.
        clip: a directory or hub id of a CLIP.
        lpips: an ONNX file: see measure.quality.metrics.Lpips.
        retrieval: the unpacked package of the demo's training pictures.
        statistics: an .npz of mu and sigma that FID compares with, in place of the reference.
        latents: an .npy of the noise that every image starts from.
        preset: ``mlperf``, or empty.
        folder: keep pictures there; those that are there already are not drawn again.
        threads: 0 for every core.
    """

    against: str | None = None
    prompts: Path | None = None
    metrics: tuple[str, ...] = ()
    images: int | None = None
    seed: int = 0
    request: Request | None = None
    network: str | None = None
    inception: Path | None = None
    clip: str | None = None
    lpips: Path | None = None
    retrieval: Path | None = None
    statistics: Path | None = None
    latents: Path | None = None
    preset: str = ""
    folder: Path | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise SettingsError(f"no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
        if self.images is not None and not 1 <= self.images <= _MOST:
            raise SettingsError(f"images is a whole number from 1 to {_MOST:,}, not {self.images}")
        if self.preset not in ("", "mlperf"):
            raise SettingsError(f"no preset {self.preset!r}: there is mlperf")
        if self.preset and self.request:
            raise SettingsError(f"--preset mlperf sets {', '.join(self.request)} itself: drop it")


def load_metric_inputs(
    evaluation: Evaluation, manifest: Manifest, requests: Sequence[Settings]
) -> MetricInputs:
    """Load every network, and show it a blank picture: what it lacks is better known now."""
    network = _network(evaluation.network) if evaluation.network else None
    blank = np.zeros((1, 3, requests[0].height, requests[0].width), np.float32)
    distances: dict[str, Distance] = {}
    names: dict[str, str] = {}
    if network is not None and network(blank).maps:
        distances["perceptual"], names["perceptual"] = Perceptual(network).each, network.name
    if evaluation.lpips:
        lpips = Lpips(evaluation.lpips)
        lpips.each(blank, blank)
        distances["lpips"], names["lpips"] = lpips.each, lpips.name
    features = _inception(evaluation.inception) if evaluation.inception else network
    return MetricInputs(
        distances=distances,
        features=features,
        gives=ImageFeatures() if features is None else features(blank),
        clip=_clip(evaluation.clip) if evaluation.clip else None,
        statistics=_statistics(evaluation.statistics) if evaluation.statistics else None,
        shares=_shares(evaluation, manifest, requests),
        names=names,
    )


def _network(name: str) -> Network:
    from latentforge.measure.quality.networks import LITE0, EfficientNetLite0

    return EfficientNetLite0() if name == LITE0 else OnnxNetwork(Path(name))


def _inception(weights: Path) -> Network:
    from latentforge.measure.quality.networks import Inception

    return Inception(weights)


def _clip(source: str) -> Any:
    from latentforge.measure.quality.networks import ClipNetwork

    return ClipNetwork(source)


def _statistics(path: Path) -> Any:
    from latentforge.measure.quality.distribution import Statistics

    return Statistics.read(path)


def _shares(
    evaluation: Evaluation, manifest: Manifest, requests: Sequence[Settings]
) -> dict[str, Any]:
    """What can be told of the demo checkpoint's pictures, where its prompts are the demo's."""
    if manifest.source.checkpoint != "demo":
        return {}
    from latentforge.export.demo import score  # noqa: TID251

    try:
        for request in requests:
            score.parse(request.prompts[0])
    except ValueError:
        return {}
    shares: dict[str, Any] = {
        "colour": lambda gallery, texts: sum(
            score.border(picture) == score.parse(text)[1]
            for picture, text in zip(gallery, texts, strict=True)
        )
    }
    if evaluation.retrieval is not None:
        originals = _originals(evaluation.retrieval)
        shares["retrieval"] = lambda gallery, texts: score.score(gallery, texts, originals).names
    return shares


def _originals(package: Path) -> NDArray[np.uint8]:
    from latentforge.export.demo.data import pictures  # noqa: TID251

    try:
        return pictures(package)
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(
            f"{package} does not hold the demo's training pictures: {error}; unpack "
            "emoji-datasource-google 16.0.0 and name its folder package"
        ) from error


def metrics_of(
    evaluation: Evaluation, judges: MetricInputs, able: Sequence[str], images: int
) -> list[str]:
    """Those asked for, or all that can be had; in the order of METRICS."""
    enough = [name for name in able if images > 1 or name not in _OF_SEVERAL]
    asked = evaluation.metrics or enough
    possible = {*enough, *(["ppl"] if judges.distances and images > 1 else [])}
    if lacking := [name for name in asked if name not in possible]:
        few = images < 2 and lacking[0] in _OF_SEVERAL
        needs = "needs two images or more: give --images" if few else _NEEDS[lacking[0]]
        raise SettingsError(f"{lacking[0]} {needs}")
    if not asked:
        raise SettingsError("nothing to judge by: give --against a checkpoint, or a --network")
    if by_torch := [name for name in asked if name in (*DISTRIBUTION, "is", "clip")]:
        _check_library(by_torch[0])
    return [name for name in METRICS if name in asked]


def _check_library(metric: str) -> None:
    """Find out before anything is drawn."""
    try:
        importlib.import_module("latentforge.measure.quality.distribution")
    except ImportError as error:
        raise SettingsError(
            f"{metric} needs torchmetrics ({error}): pip install 'latentforge[eval]'"
        ) from error


_OF_SEVERAL = ("fid", "kid", "is", "cmmd", "ppl")
_AGAINST = "needs --against: pictures to compare with"
_NEEDS = {
    "psnr": _AGAINST,
    "ssim": _AGAINST,
    "lpips": "needs --against, and --lpips: its network as an ONNX file",
    "perceptual": "needs --against, and a --network that gives feature maps",
    "fid": "needs a --network that gives features, or --inception; and --against or --statistics",
    "kid": "needs a --network that gives features, or --inception; and --against",
    "is": "needs a --network that gives logits, or --inception",
    "clip": "needs --clip: the directory or hub id of a CLIP",
    "cmmd": "needs --against, and --clip: the directory or hub id of a CLIP",
    "ppl": "needs a --network that gives feature maps, or --lpips: a distance between pictures",
    "colour": "is for the demo checkpoint, with prompts such as: owl on a pink background",
    "retrieval": "is for the demo checkpoint and its prompts, and needs --retrieval: its pictures",
}


def distance_of(judges: MetricInputs) -> Distance:
    return judges.distances.get("lpips") or judges.distances["perceptual"]


def path_metric(name: str, lengths: NDArray[np.float64], judges: MetricInputs) -> Metric:
    found = path_length(lengths)
    by = "lpips" if "lpips" in judges.distances else "perceptual"
    return Metric(
        name="ppl",
        subject=name,
        value=found.value,
        low=found.low,
        high=found.high,
        images=2 * len(lengths),
        better="lower",
        network=judges.names[by],
        note=f"median {np.median(lengths):.4g}; by {by} distance",
    )
