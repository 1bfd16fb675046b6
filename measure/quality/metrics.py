"""Metrics of image pairs generated from the same prompt and seed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import structural_similarity

from latentforge.measure.quality.features import (
    Network,
    OnnxNetwork,
    batches,
    load_onnx,
    run_onnx,
)
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import MAX_PSNR, psnr, to_array

__all__ = ["Distance", "Lpips", "Perceptual", "compare_images", "compare_pairs", "decibels"]
__all__ += ["is_constant"]

Array = NDArray[np.float32]

Distance = Callable[[Array, Array], NDArray[np.floating]]
"""Distance of images (n, 3, height, width) in -1..1, pair by pair: (n,)."""

_PEAK = 2.0  # pixels are compared in -1..1
_SMALLEST = 7  # the side of SSIM's window


def compare_images(
    references: Sequence[Image.Image],
    candidates: Sequence[Image.Image],
    perceptual: "Perceptual | None" = None,
) -> dict[str, float]:
    """Compare images pair by pair.

    Returns:
        ``psnr`` of all pixels together and ``psnr_worst`` of the worst pair, in dB; ``ssim``, the
        mean of Wang et al. (2004), and, where a network is given, the mean ``perceptual`` distance.
    """
    a, b = to_array(references), to_array(candidates)
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
    """Return True if one of the images has a single colour, as black images do."""
    return any(np.ptp(np.asarray(image), axis=(0, 1)).max() == 0 for image in images)


def _ssim(a: Array, b: Array) -> float:
    similarity = structural_similarity(  # type: ignore[no-untyped-call]
        a, b, channel_axis=0, data_range=_PEAK
    )
    return float(similarity)


def compare_pairs(
    references: Sequence[Image.Image],
    candidates: Sequence[Image.Image],
    distances: Mapping[str, Distance],
) -> dict[str, NDArray[np.float64]]:
    """Return the metrics of each pair, (pairs,) by name; images are read in batches.

    Returns:
        ``error``, the mean squared error in -1..1, which decibels() turns into PSNR; ``ssim``, for
        images of at least 7 pixels a side; and every distance under its name.

    Raises:
        ShapeError: the images are of unequal size or number.
    """
    rows: dict[str, list[NDArray[np.floating]]] = {}
    for a, b in batches(references, candidates):
        figures = {"error": np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))}
        if min(a.shape[2:]) >= _SMALLEST:
            figures["ssim"] = np.array([_ssim(x, y) for x, y in zip(a, b, strict=True)])
        figures |= {name: np.asarray(distance(a, b)) for name, distance in distances.items()}
        for name, values in figures.items():
            rows.setdefault(name, []).append(values)
    return {name: np.concatenate(values).astype(np.float64) for name, values in rows.items()}


def decibels(error: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the PSNR of mean squared errors in -1..1, capped at MAX_PSNR."""
    floor = _PEAK**2 / 10 ** (MAX_PSNR / 10)
    return 10 * np.log10(_PEAK**2 / np.maximum(error, floor))


class Perceptual:
    """Perceptual distance by the features of a network: LPIPS without its learned weights.

    At each layer features are scaled to unit length over the channels; the distance is the squared
    difference, summed over channels, averaged over positions and summed over layers: Zhang et al.
    (2018), arXiv 1801.03924, equation 1 with w = 1.

    Args:
        network: a network with feature maps, or an ONNX file for OnnxNetwork.

    Raises:
        SettingsError: the network is missing.
    """

    def __init__(self, network: Path | Network) -> None:
        self._network = OnnxNetwork(network) if isinstance(network, Path) else network

    def __call__(self, a: Array, b: Array) -> float:
        """Return the mean distance of images (batch, 3, height, width)."""
        return float(self.each(a, b).mean())

    def each(self, a: Array, b: Array) -> Array:
        """Return the distance of each pair, (batch,)."""
        layers = zip(self._features(a), self._features(b), strict=True)
        apart = [np.square(x - y).sum(axis=1).mean(axis=(1, 2)) for x, y in layers]
        distances: Array = np.sum(apart, axis=0, dtype=np.float32)
        return distances

    def _features(self, pictures: Array) -> list[Array]:
        maps = self._network(pictures).maps
        if not maps:
            raise SettingsError(
                f"{self._network.name} has no feature maps (batch, channels, h, w), which a "
                "perceptual distance compares: use a network with such outputs"
            )
        return [m / (np.linalg.norm(m, axis=1, keepdims=True) + 1e-10) for m in maps]


class Lpips:
    """LPIPS with its learned weights: Zhang et al. (2018), arXiv 1801.03924.

    Args:
        path: an ONNX file with two inputs, images (batch, 3, height, width) in -1..1, and one
            output, their distances (batch, ...), as ``torch.onnx.export`` makes of the lpips
            package's ``LPIPS(net="alex")``.

    Raises:
        SettingsError: the network is missing.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._session = load_onnx(path, inputs=2)
        self._inputs = [given.name for given in self._session.get_inputs()]

    def each(self, a: Array, b: Array) -> Array:
        """Return the distance of each pair, (batch,)."""
        given = dict(zip(self._inputs, (a, b), strict=True))
        return run_onnx(self._session, given, self.name)[0].reshape(len(a))
