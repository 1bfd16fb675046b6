"""How far a figure of some images may be from that of endlessly many: 95 % intervals.

All resampling is over images and seeded: the same figures give the same interval.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.results import ConfidenceInterval

__all__ = ["around", "drawn", "mean", "share"]

Array = NDArray[np.float64]

_DRAWS = 1000
_TAILS = 2.5, 97.5  # percent
_Z = 1.959964  # of the normal distribution, between its tails


def drawn(count: int, *, draws: int = _DRAWS, seed: int = 0) -> Array:
    """How often each of ``count`` images is in each resample: (draws, count), rows sum to count."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def mean(
    values: NDArray[np.floating],
    *,
    scale: Callable[[Array], Array] = np.asarray,
    seed: int = 0,
) -> ConfidenceInterval:
    """The mean of one value an image (count,), with the percentiles of resampled means.

    Args:
        values: one an image.
        scale: what the figure is of a mean, such as dB of a squared error; monotone.
        seed: of the resampling.
    """
    every = np.asarray(values, np.float64)
    value = float(scale(every.mean()))
    if len(every) < 2:
        return ConfidenceInterval(value=value)
    low, high = np.percentile(scale(drawn(len(every), seed=seed) @ every / len(every)), _TAILS)
    return ConfidenceInterval(value=value, low=float(low), high=float(high))


def share(hits: int, count: int) -> ConfidenceInterval:
    """A share of images with its score interval: Wilson (1927), which holds near 0 and 1 too."""
    value, z2 = hits / count, _Z**2
    middle = (value + z2 / (2 * count)) / (1 + z2 / count)
    inner = value * (1 - value) / count + z2 / (4 * count**2)
    half = _Z * math.sqrt(inner) / (1 + z2 / count)
    return ConfidenceInterval(
        value=value, low=max(0.0, middle - half), high=min(1.0, middle + half)
    )


def around(value: float, resampled: Array) -> ConfidenceInterval:
    """A figure that resampling shifts, because it repeats images: only the draws' spread counts.

    Draws that are NaN, for want of two different images, don't count.
    """
    low, high = np.nanpercentile(resampled, _TAILS) - np.nanmean(resampled)
    return ConfidenceInterval(value=value, low=value + float(low), high=value + float(high))
