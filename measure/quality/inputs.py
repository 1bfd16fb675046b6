"""Inputs of metrics: networks, distances, reference statistics and accuracies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.measure.quality.features import ImageFeatures, Network, OnnxNetwork
from latentforge.measure.quality.metrics import Distance, Lpips, Perceptual

if TYPE_CHECKING:
    from latentforge.measure.quality.request import EvalRequest

__all__ = ["Accuracy", "ClipEncoder", "Gallery", "MetricInputs", "load_metric_inputs"]

Array = NDArray[np.float32]

Gallery = Sequence[Image.Image]
"""Images of one participant, in the order of the prompts."""

Accuracy = Callable[[Gallery, Sequence[str]], int]
"""Counts the images that show what their prompts ask for."""


class ClipEncoder(Network, Protocol):
    """Network that embeds images and texts in one space."""

    def texts(self, prompts: Sequence[str]) -> Array:
        """Return the embeddings of texts, (n, width)."""


@dataclass(frozen=True, kw_only=True)
class MetricInputs:
    """Loaded inputs of the metrics; a metric whose input is missing cannot be computed.

    Attributes:
        distances: by metric, ``lpips`` or ``perceptual``.
        features: network of FID, KID and IS.
        probe: output of ``features`` for one blank image, which shows what it provides.
        clip: network of the CLIP score and CMMD.
        statistics: distribution.Statistics that FID compares with in place of the reference.
        accuracies: by metric, ``colour`` or ``retrieval``.
        names: names of the networks of ``distances``, by metric.
    """

    distances: Mapping[str, Distance] = field(default_factory=dict)
    features: Network | None = None
    probe: ImageFeatures = field(default_factory=ImageFeatures)
    clip: ClipEncoder | None = None
    statistics: Any = None
    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def distance(self) -> Distance:
        """The learned distance if there is one, else the perceptual one."""
        return self.distances.get("lpips") or self.distances["perceptual"]

    def available(self, *, reference: bool) -> list[str]:
        """Return the metrics that these inputs suffice for, with or without a reference."""
        features = self.probe.features is not None
        possible = {"psnr": reference, "ssim": reference}
        possible |= {name: reference and name in self.distances for name in ("lpips", "perceptual")}
        possible |= {"fid": features and (reference or self.statistics is not None)}
        possible |= {"kid": features and reference, "cmmd": self.clip is not None and reference}
        possible |= {"is": self.probe.logits is not None, "clip": self.clip is not None}
        possible |= {name: name in self.accuracies for name in ("colour", "retrieval")}
        return [name for name, available in possible.items() if available]


def load_metric_inputs(
    request: EvalRequest,
    size: tuple[int, int],
    accuracies: Mapping[str, Accuracy],
) -> MetricInputs:
    """Load every network and run it on one blank image, so that a mismatch shows at once.

    Args:
        request: names the networks.
        size: height and width of the images, in pixels.
        accuracies: by metric, those that the caller has for these prompts.

    Raises:
        SettingsError: a network or file is missing, or of another kind.
    """
    network = _network(request.network) if request.network else None
    blank = np.zeros((1, 3, *size), np.float32)
    distances: dict[str, Distance] = {}
    names: dict[str, str] = {}
    if network is not None and network(blank).maps:
        distances["perceptual"], names["perceptual"] = Perceptual(network).each, network.name
    if request.lpips:
        lpips = Lpips(request.lpips)
        lpips.each(blank, blank)
        distances["lpips"], names["lpips"] = lpips.each, lpips.name
    features = _inception(request.inception) if request.inception else network
    return MetricInputs(
        distances=distances,
        features=features,
        probe=ImageFeatures() if features is None else features(blank),
        clip=_clip(request.clip) if request.clip else None,
        statistics=_statistics(request.statistics) if request.statistics else None,
        accuracies=accuracies,
        names=names,
    )


# torch is imported only where a network of torch is requested.


def _network(name: str) -> Network:
    from latentforge.measure.quality.networks import LITE0, EfficientNetLite0

    return EfficientNetLite0() if name == LITE0 else OnnxNetwork(Path(name))


def _inception(weights: Path) -> Network:
    from latentforge.measure.quality.networks import Inception

    return Inception(weights)


def _clip(source: str) -> ClipEncoder:
    from latentforge.measure.quality.networks import ClipNetwork

    return ClipNetwork(source)


def _statistics(path: Path) -> Any:
    from latentforge.measure.quality.distribution import Statistics

    return Statistics.read(path)
