"""95 % confidence intervals for metrics estimated from a finite set of images.

Resampling is over images, and seeded: equal values give equal intervals.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.results import ConfidenceInterval

__all__ = ["LEVEL", "centred", "mean", "proportion", "resample_counts"]

LEVEL = 0.95
"""Confidence level of all intervals of quality metrics."""

Array = NDArray[np.float64]

_DRAWS = 1000
_TAILS = 2.5, 97.5  # percent
_Z = 1.959964  # 97.5 % quantile of the normal distribution


def resample_counts(count: int, *, draws: int = _DRAWS, seed: int = 0) -> Array:
    """Return how often each of ``count`` images occurs in each resample: (draws, count)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def mean(
    values: NDArray[np.floating],
    *,
    scale: Callable[[Array], Array] = np.asarray,
    seed: int = 0,
) -> ConfidenceInterval:
    """Return the mean of one value per image, with the percentiles of resampled means.

    Args:
        values: one per image, (count,).
        scale: monotone function of the mean, such as dB of a squared error.
        seed: of the resampling.
    """
    every = np.asarray(values, np.float64)
    value = float(scale(every.mean()))
    if len(every) < 2:
        return ConfidenceInterval(value=value)
    low, high = np.percentile(
        scale(resample_counts(len(every), seed=seed) @ every / len(every)), _TAILS
    )
    return ConfidenceInterval(value=value, low=float(low), high=float(high), level=LEVEL)


def proportion(successes: int, count: int) -> ConfidenceInterval:
    """Return a proportion of images with Wilson's score interval (1927), valid near 0 and 1 too."""
    value, z2 = successes / count, _Z**2
    middle = (value + z2 / (2 * count)) / (1 + z2 / count)
    inner = value * (1 - value) / count + z2 / (4 * count**2)
    half = _Z * math.sqrt(inner) / (1 + z2 / count)
    return ConfidenceInterval(
        value=value, low=max(0.0, middle - half), high=min(1.0, middle + half), level=LEVEL
    )


def centred(value: float, resampled: Array) -> ConfidenceInterval:
    """Return a value with the spread of its resampled values, shifted to lie around it.

    Resampling repeats images, which biases FID and its kin; only the spread is used. Draws that are
    NaN (no two different images) are ignored.
    """
    low, high = np.nanpercentile(resampled, _TAILS) - np.nanmean(resampled)
    return ConfidenceInterval(
        value=value, low=value + float(low), high=value + float(high), level=LEVEL
    )
