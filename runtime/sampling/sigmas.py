"""Spacings of sigma / alpha: Karras', exponential, by the beta distribution, and Lu's."""

import math

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.sampling.options import SigmaSpacing

__all__ = ["respaced"]

Array64 = NDArray[np.float64]

_KARRAS_RHO = 7.0
_BETA = 0.6  # both parameters of the beta distribution
_TERMS = 60  # of its series: it converges as 2**-n up to the median
_BISECTIONS = 60


def respaced(spacing: SigmaSpacing, high: float, low: float, count: int) -> Array64:
    """Return values of sigma / alpha from high to low, of shape (count,).

    Args:
        spacing: "karras": Karras et al. (2022), equation 5. "exponential" and "lu": evenly in the
            logarithm (Lu et al. 2022, uniform lambda). "beta": quantiles of a beta distribution
            (Lee et al. 2024, arXiv 2407.12173).
        high, low: first and last value.
        count: number of values; the first alone if it is 1.
    """
    ramp = np.linspace(0, 1, count)
    match spacing:
        case "karras":
            ends = high ** (1 / _KARRAS_RHO), low ** (1 / _KARRAS_RHO)
            return np.asarray((ends[0] + ramp * (ends[1] - ends[0])) ** _KARRAS_RHO)
        case "exponential":
            return np.exp(np.linspace(math.log(high), math.log(low), count))
        case "lu":  # with ends in float32, as diffusers has them
            first, last = (float(np.log(np.float32(value))) for value in (high, low))
            return np.exp(first + ramp * (last - first))
        case "beta":
            return low + _beta_quantiles(1 - ramp) * (high - low)


def _beta_quantiles(chances: Array64) -> Array64:
    """Return the quantiles of the symmetric beta distribution, by bisection below its median."""
    below = np.minimum(chances, 1 - chances)
    left, right = np.zeros_like(below), np.full_like(below, 0.5)
    for _ in range(_BISECTIONS):
        middle = (left + right) / 2
        under = _beta_chance(middle) < below
        left, right = np.where(under, middle, left), np.where(under, right, middle)
    quantile = np.where(below == 0, 0, (left + right) / 2)
    return np.where(chances > 0.5, 1 - quantile, quantile)


def _beta_chance(x: Array64) -> Array64:
    """Return the probability of a value below x <= 1/2, by the series of the incomplete beta."""
    n = np.arange(_TERMS)
    factors = np.cumprod(np.append(1.0, (1 - _BETA + n[:-1]) / (n[:-1] + 1))) / (_BETA + n)
    total = math.gamma(_BETA) ** 2 / math.gamma(2 * _BETA)
    series = np.sum(factors * x[:, None] ** n, axis=1)
    return np.asarray(x**_BETA * series / total, np.float64)
