"""Second order multistep extrapolation of the clean latent, for DPM-Solver++ and UniPC."""

from typing import NamedTuple

from latentforge.runtime.sampling.levels import NoiseInterval, NoiseLevel
from latentforge.runtime.sampling.moves import blend
from latentforge.runtime.sampling.sampler import Array

__all__ = ["Evaluation", "extrapolate", "midpoint"]


class Evaluation(NamedTuple):
    """Estimate of the clean latent at a noise level."""

    level: NoiseLevel
    denoised: Array


def midpoint(now: Evaluation, last: Evaluation | None, interval: NoiseInterval) -> Array:
    """Extrapolate the clean latent to the middle of the interval.

    The first step, and one that ends without noise, use the present estimate.
    """
    if last is None or interval.end.sigma == 0:
        return now.denoised
    return extrapolate(now, last, interval, 1 / 2)


def extrapolate(
    now: Evaluation, last: Evaluation, interval: NoiseInterval, fraction: float
) -> Array:
    """Extrapolate the clean latent linearly in log(alpha / sigma).

    Args:
        now: estimate at the start of the interval.
        last: the estimate before it.
        interval: the step to take.
        fraction: position in the interval, from 0 at its start to 1 at its end.
    """
    h = interval.end.log_snr - now.level.log_snr
    weight = fraction * h / (now.level.log_snr - last.level.log_snr)
    return blend((1 + weight, now.denoised), (-weight, last.denoised))
