"""Request of an evaluation: which images, which metrics, and by which networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from latentforge.measure.quality.catalogue import METRICS
from latentforge.measure.quality.inputs import MetricInputs
from latentforge.measure.quality.scores import DISTRIBUTION
from latentforge.runtime.annotations import check_fields
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.settings import Request
from latentforge.runtime.validation import check_optional_count, check_threads

__all__ = ["EvalRequest", "select_metrics"]

_MAX_IMAGES = 100_000


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """Request of an evaluation.

    Attributes:
        against: reference: a checkpoint, drawn by diffusers, or an engine directory. None for
            metrics that need no reference.
        prompts: text file with one prompt per line, or MLPerf's .tsv. None for the demo's own
            prompts, or those that come with the package.
        metrics: names of METRICS. Empty for all that can be computed, except ``ppl``.
        images: number of images per participant. None for one per prompt of the file, or 64.
        seed: seed of the first image; each following image has the next one.
        request: further settings of every image; the first engine directory's defaults fill in the
            rest. Engines with an acceleration plan follow it unless the request is unaccelerated.
        network: ``efficientnet-lite0``, or an ONNX file for features.OnnxNetwork.
        inception: weights of the standard Inception, which FID, KID and IS then use in place of
            ``network``.
        clip: directory or hub id of a CLIP model.
        lpips: ONNX file for metrics.Lpips.
        retrieval: unpacked package of the demo's training images.
        statistics: .npz of mu and sigma that FID compares with in place of the reference.
        latents: .npy of the initial noise that every image starts from.
        preset: ``mlperf``, or empty.
        folder: where images are kept; existing ones are not generated again.
        threads: of each participant; 0 for LATENTFORGE_THREADS of them, or every core.

    Raises:
        SettingsError: a metric or preset does not exist, or a number is out of range.
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
        check_fields(self)
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise SettingsError(f"no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
        check_optional_count("images", self.images, _MAX_IMAGES)
        check_threads(self.threads)
        if self.preset not in ("", "mlperf"):
            raise SettingsError(f"no preset {self.preset!r}: there is mlperf")
        if self.preset and self.request:
            raise SettingsError(
                f"--preset mlperf sets {', '.join(self.request)} itself: leave it out"
            )


def select_metrics(request: EvalRequest, inputs: MetricInputs) -> list[str]:
    """Return the metrics to compute, in the order of METRICS.

    Args:
        request: names metrics, or none for all that the inputs suffice for.
        inputs: the loaded networks, statistics and accuracies.

    Raises:
        SettingsError: a named metric lacks an input, torchmetrics or a second image, or there is
            no metric to compute.
    """
    images = 2 if request.images is None else request.images
    available = [
        name
        for name in inputs.available(reference=request.against is not None)
        if images > 1 or name not in _NEED_SEVERAL_IMAGES
    ]
    selected = request.metrics or available
    possible = {*available, *(["ppl"] if inputs.distances and images > 1 else [])}
    if lacking := [name for name in selected if name not in possible]:
        too_few = images < 2 and lacking[0] in _NEED_SEVERAL_IMAGES
        reason = "needs two images or more: give --images" if too_few else _NEEDS[lacking[0]]
        raise SettingsError(f"{lacking[0]} {reason}")
    if not selected:
        raise SettingsError(
            "no metric can be computed: give --against a checkpoint, or a --network"
        )
    _check_library(selected)
    return [name for name in METRICS if name in selected]


def _check_library(metrics: Sequence[str]) -> None:
    """Fail before any image is generated where torchmetrics is needed and missing."""
    needing = [name for name in metrics if name in (*DISTRIBUTION, "is", "clip")]
    if not needing:
        return
    try:
        import_module("latentforge.measure.quality.distribution")
    except ImportError as error:
        raise SettingsError(
            f"{needing[0]} needs torchmetrics ({error}): pip install 'latentforge[eval]'"
        ) from error


_NEED_SEVERAL_IMAGES = ("fid", "kid", "is", "cmmd", "ppl")
_AGAINST = "needs --against: images to compare with"
_NEEDS = {
    "psnr": _AGAINST,
    "ssim": _AGAINST,
    "lpips": "needs --against, and --lpips: its network as an ONNX file",
    "perceptual": "needs --against, and a --network with feature maps",
    "fid": "needs a --network with features, or --inception; and --against or --statistics",
    "kid": "needs a --network with features, or --inception; and --against",
    "is": "needs a --network with logits, or --inception",
    "clip": "needs --clip: the directory or hub id of a CLIP model",
    "cmmd": "needs --against, and --clip: the directory or hub id of a CLIP model",
    "ppl": "needs a --network with feature maps, or --lpips: a distance between images",
    "colour": "is for the demo checkpoint, with prompts such as: owl on a pink background",
    "retrieval": "is for the demo checkpoint and its prompts, and needs --retrieval: its training "
    "images",
}
