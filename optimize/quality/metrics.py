"""How far pictures are apart, when both were made of one prompt and one seed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import structural_similarity

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import psnr, to_array

__all__ = ["Perceptual", "compare_images", "is_constant"]

Array = NDArray[np.float32]

_PEAK = 2.0  # pixels are compared in -1..1
_SMALLEST = 7  # the side of SSIM's window


def compare_images(
    references: Sequence[Image.Image],
    others: Sequence[Image.Image],
    perceptual: "Perceptual | None" = None,
) -> dict[str, float]:
    """Compare pictures pair by pair.

    Returns:
        ``psnr`` of all pixels together and ``psnr_worst`` of the worst pair, in dB; ``ssim``, the
        mean of Wang et al. (2004), and, where a network is given, the mean ``perceptual`` distance.
    """
    a, b = to_array(references), to_array(others)
    figures = {
        "psnr": psnr(a, b, peak=_PEAK),
        "psnr_worst": min(psnr(x, y, peak=_PEAK) for x, y in zip(a, b, strict=True)),
    }
    if min(a.shape[2:]) >= _SMALLEST:
        figures["ssim"] = float(np.mean([_ssim(x, y) for x, y in zip(a, b, strict=True)]))
    if perceptual is not None:
        figures["perceptual"] = perceptual(a, b)
    return figures


def is_constant(images: Sequence[Image.Image]) -> bool:
    """Whether one of the pictures has a single colour, as black ones do."""
    return any(np.ptp(np.asarray(image), axis=(0, 1)).max() == 0 for image in images)


def _ssim(a: Array, b: Array) -> float:
    similarity = structural_similarity(  # type: ignore[no-untyped-call]
        a, b, channel_axis=0, data_range=_PEAK
    )
    return float(similarity)


class Perceptual:
    """A distance by the features of a network, as LPIPS without its learned weights.

    At each layer features are scaled to unit length over the channels; the distance is the squared
    difference, summed over channels, averaged over positions and summed over layers: Zhang et al.
    (2018), arXiv 1801.03924, equation 1 with w = 1.

    Args:
        path: an ONNX file of one input, pictures (batch, 3, height, width) in -1..1, whose outputs
            are feature maps (batch, channels, h, w).

    Raises:
        SettingsError: there is no such network.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors share no base class of their own
            reason = " ".join(str(error).split())
            raise SettingsError(f"{path} is no network to compare pictures by: {reason}") from error
        self._input = self._session.get_inputs()[0].name

    def __call__(self, a: Array, b: Array) -> float:
        """The mean distance of pictures (batch, 3, height, width), pair by pair."""
        layers = zip(self._features(a), self._features(b), strict=True)
        return float(sum(np.square(x - y).sum(axis=1).mean() for x, y in layers))

    def _features(self, pictures: Array) -> list[Array]:
        maps = self._session.run(None, {self._input: pictures.astype(np.float32)})
        return [m / (np.linalg.norm(m, axis=1, keepdims=True) + 1e-10) for m in maps]
