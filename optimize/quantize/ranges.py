"""Quantization grids of activations, chosen from calibrated ranges: minmax, percentile or mse.

calibration.py collects the ranges.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.optimize.quantize.calibration import ActivationRange, histogram_edges
from latentforge.optimize.quantize.options import Int8Settings

__all__ = ["Grid", "choose_grid"]

Array = NDArray[Any]

_CLIP_FRACTIONS = 2.0 ** (-np.arange(33) / 8)  # of the whole range, down to a sixteenth


@dataclass(frozen=True)
class Grid:
    """Quantization grid: the numbers (q - zero_point) * scale for q from qmin to qmax."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int

    def round(self, x: Array) -> Array:
        """Round to the nearest number on the grid, as QuantizeLinear and DequantizeLinear do."""
        steps = np.clip(np.rint(x / self.scale) + self.zero_point, self.qmin, self.qmax)
        return np.asarray((steps - self.zero_point) * self.scale)


def choose_grid(observed: ActivationRange, settings: Int8Settings, *, signed: bool) -> Grid:
    """Choose the grid of an activation: symmetric int8, or uint8.

    Args:
        observed: range of the activation's values.
        settings: the clipping method, and whether uint8 is symmetric too.
        signed: use int8, without -128.
    """
    clip = _clip(observed, settings, symmetric=signed or settings.symmetric)
    return _grid(observed, clip, signed=signed, symmetric=settings.symmetric)


def _grid(observed: ActivationRange, clip: float, *, signed: bool, symmetric: bool) -> Grid:
    """Return the grid up to a magnitude; it always contains 0, which padding and masks need."""
    low, high = max(observed.min, -clip), min(observed.max, clip)
    if signed or symmetric or low == high:
        zero = 0 if signed else 128
        return Grid(_scale(max(high, -low) / 127), zero, zero - 127, zero + 127)
    scale = _scale((high - low) / 255)
    return Grid(scale, int(np.clip(np.rint(-low / scale), 0, 255)), 0, 255)


def _scale(step: float) -> float:
    """Round a scale to float32; 1 for a tensor that is all zeros."""
    return float(np.float32(step)) if step > np.finfo(np.float32).tiny else 1.0


def _clip(observed: ActivationRange, settings: Int8Settings, *, symmetric: bool) -> float:
    """Return the magnitude at which the chosen method clips."""
    if settings.ranges == "minmax" or not observed.histogram.sum():
        return observed.magnitude
    if settings.ranges == "percentile":
        return _percentile(observed, settings.percentile)
    return _min_mse_clip(observed, symmetric=symmetric)


def _percentile(observed: ActivationRange, percentile: float) -> float:
    """Return the upper edge of the bin that holds a percentile of |x|."""
    total = np.cumsum(observed.histogram.sum(axis=0))
    index = int(np.searchsorted(total, percentile / 100 * total[-1]))
    return min(observed.magnitude, float(histogram_edges()[index + 1]))


def _min_mse_clip(observed: ActivationRange, *, symmetric: bool) -> float:
    """Return the clipping magnitude with the smallest squared error of the binned values."""
    edges = histogram_edges()
    centers = np.sqrt(edges[:-1] * edges[1:])
    values = np.minimum(np.stack([centers, -centers]), observed.magnitude)
    clips = observed.magnitude * _CLIP_FRACTIONS
    grids = [_grid(observed, clip, signed=False, symmetric=symmetric) for clip in clips]
    errors = [np.sum(observed.histogram * (grid.round(values) - values) ** 2) for grid in grids]
    return float(clips[int(np.argmin(errors))])
