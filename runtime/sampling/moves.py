"""Moves between noise levels, from which the samplers are made.

All of them keep x in the variance-preserving scale, x = alpha * clean + sigma * noise, where every
step is finite at zero terminal SNR. There, most samplers differ only in the levels they visit and
in the clean latent they step towards:

    ddim     x' = alpha' D + sigma' (x - alpha D) / sigma
    noise    x' = alpha' (x - sigma e) / alpha + sigma' e
    renoise  x' = alpha' D + sigma' (r (x - alpha D) / sigma + sqrt(1 - r**2) z)

    shift    x' = alpha' x / alpha + 2 sigma' (1 - q) e + sigma' sqrt(q**2 - 1) z

D is a clean latent, e a noise, z fresh noise, a prime marks the level at the end of the interval,
and r is the ratio of sigma' / alpha' to sigma / alpha. With e = (x - alpha D) / sigma, the second
move equals the first; q is 1 / r. Weights are computed in float64, arrays in float32.
"""

import math

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.sampling.levels import NoiseInterval, NoiseLevel
from latentforge.runtime.sampling.options import SolverOptions

__all__ = [
    "blend",
    "clipped",
    "clipped_move",
    "ddim_move",
    "noise_in",
    "noise_move",
    "renoise_move",
    "shift_move",
]

Array = NDArray[np.float32]


def blend(*terms: tuple[float, Array]) -> Array:
    """Return the weighted sum of arrays of one shape."""
    products = [np.float32(weight) * array for weight, array in terms]
    return sum(products[1:], start=products[0])


def ddim_move(x: Array, clean: Array, interval: NoiseInterval) -> Array:
    """Step towards a clean latent and keep the noise that is in x."""
    start, end = interval
    kept = end.sigma / start.sigma
    return blend((kept, x), (end.alpha - kept * start.alpha, clean))


def clipped(clean: Array, options: SolverOptions) -> Array:
    """Return a clean latent, clipped if the options ask for it."""
    limit = np.float32(options.clip_sample_range)
    return np.clip(clean, -limit, limit) if options.clip_sample else clean


def clipped_move(
    x: Array, clean: Array, interval: NoiseInterval, options: SolverOptions
) -> tuple[Array, Array]:
    """Step towards the clipped clean latent and keep the noise of the unclipped one.

    Returns:
        The latents, and the clean latent that the step went towards.
    """
    if not options.clip_sample:
        return ddim_move(x, clean, interval), clean
    limited = clipped(clean, options)
    noise = noise_in(x, clean, interval.start)
    return blend((interval.end.alpha, limited), (interval.end.sigma, noise)), limited


def noise_move(x: Array, noise: Array, interval: NoiseInterval) -> Array:
    """Step along a noise that need not be the one in x."""
    start, end = interval
    kept = end.alpha / start.alpha
    return blend((kept, x), (end.sigma - kept * start.sigma, noise))


def renoise_move(x: Array, clean: Array, interval: NoiseInterval, fresh: Array) -> Array:
    """Step below the end of the interval and add fresh noise up to it."""
    start, end = interval
    ratio = end.sigma * start.alpha / (end.alpha * start.sigma)
    kept = ratio * end.sigma / start.sigma
    added = end.sigma * math.sqrt(max(0.0, 1 - ratio**2))  # 0 for a step of no length
    return blend((kept, x), (end.alpha - kept * start.alpha, clean), (added, fresh))


def shift_move(x: Array, noise: Array, interval: NoiseInterval, fresh: Array) -> Array:
    """Step twice as far along a noise as noise_move(), and add fresh noise (SDE-DPM-Solver)."""
    start, end = interval
    growth = start.sigma * end.alpha / (start.alpha * end.sigma)
    along = 2 * end.sigma * (1 - growth)
    added = end.sigma * math.sqrt(max(0.0, growth**2 - 1))  # 0 for a step of no length
    return blend((end.alpha / start.alpha, x), (along, noise), (added, fresh))


def noise_in(x: Array, clean: Array, level: NoiseLevel) -> Array:
    """Return the noise in x, given the clean latent."""
    return blend((1 / level.sigma, x), (-level.alpha / level.sigma, clean))
