"""Prediction types: what a denoiser's output means, and how to convert it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.levels import NoiseLevel
from latentforge.runtime.sampling.moves import blend, noise_in

__all__ = ["PREDICTIONS", "Prediction", "PredictionType", "prediction_type"]

Array = NDArray[np.float32]
Conversion = Callable[[Array, Array, NoiseLevel], Array]

Prediction = Literal["epsilon", "v_prediction", "sample", "edm_epsilon", "edm_v_prediction"]
"""Name of a prediction type: diffusers' own, or that with "edm" for an EDM schedule."""


@dataclass(frozen=True, kw_only=True)
class PredictionType:
    """Conversions between a network's output and the clean latent.

    All arrays have the shape of x, and x = level.alpha * clean + level.sigma * noise.

    Attributes:
        name: as in the manifest.
        clean: (x, output, level) -> clean latent.
        output: (x, clean, level) -> output of the network.
        noise: (x, output, level) -> noise in x.
        defined_without_signal: True if the output determines the clean latent at zero terminal
            SNR, where alpha is 0.
    """

    name: Prediction
    clean: Conversion
    output: Conversion
    noise: Conversion
    defined_without_signal: bool

    def check(self, level: NoiseLevel) -> None:
        """Check that the output determines the clean latent at this level.

        Raises:
            SettingsError: it does not.
        """
        if level.alpha == 0 and not self.defined_without_signal:
            raise SettingsError(
                f"{self.name} prediction is undefined at zero terminal SNR (alpha = 0): use a "
                "sampler that starts below it, such as euler or dpmpp_2m"
            )


def _epsilon_clean(x: Array, output: Array, level: NoiseLevel) -> Array:
    return np.asarray((x - level.sigma * output) / level.alpha, np.float32)


def _epsilon_noise(x: Array, output: Array, level: NoiseLevel) -> Array:
    return output


def _v_clean(x: Array, output: Array, level: NoiseLevel) -> Array:
    return level.alpha * x - level.sigma * output


def _v_output(x: Array, clean: Array, level: NoiseLevel) -> Array:
    return blend((level.alpha / level.sigma, x), (-1 / level.sigma, clean))


def _v_noise(x: Array, output: Array, level: NoiseLevel) -> Array:
    return blend((level.alpha, output), (level.sigma, x))


def _sample_clean(x: Array, output: Array, level: NoiseLevel) -> Array:
    return output


def _sample_output(x: Array, clean: Array, level: NoiseLevel) -> Array:
    return clean


def _edm_clean(x: Array, output: Array, level: NoiseLevel, *, sign: float = 1) -> Array:
    """Apply c_skip and c_out of Karras et al. (2022), table 1.

    There x is the network's input, so that alpha is c_in and sigma_data follows from the level.
    """
    ratio = level.sigma / level.alpha
    data = math.sqrt(1 / level.alpha**2 - ratio**2)
    return blend((data**2 * level.alpha, x), (sign * ratio * data * level.alpha, output))


def _edm_output(x: Array, clean: Array, level: NoiseLevel, *, sign: float = 1) -> Array:
    ratio = level.sigma / level.alpha
    data = math.sqrt(1 / level.alpha**2 - ratio**2)
    factor = 1 / (sign * ratio * data * level.alpha)
    return blend((factor, clean), (-factor * data**2 * level.alpha, x))


def _noise_of(clean: Conversion) -> Conversion:
    """Return the conversion to the noise, by way of the clean latent."""
    return lambda x, output, level: noise_in(x, clean(x, output, level), level)


_edm_v_clean = partial(_edm_clean, sign=-1)

_ROWS = (
    # The noise itself: Ho et al. (2020).
    PredictionType(
        name="epsilon",
        clean=_epsilon_clean,
        output=noise_in,
        noise=_epsilon_noise,
        defined_without_signal=False,
    ),
    # v = alpha * noise - sigma * clean: Salimans & Ho (2022), arXiv 2202.00512.
    PredictionType(
        name="v_prediction",
        clean=_v_clean,
        output=_v_output,
        noise=_v_noise,
        defined_without_signal=True,
    ),
    # The clean latent itself.
    PredictionType(
        name="sample",
        clean=_sample_clean,
        output=_sample_output,
        noise=_noise_of(_sample_clean),
        defined_without_signal=True,
    ),
    # The preconditioned network of EDM, and its negative, which diffusers names v_prediction.
    PredictionType(
        name="edm_epsilon",
        clean=_edm_clean,
        output=_edm_output,
        noise=_noise_of(_edm_clean),
        defined_without_signal=False,
    ),
    PredictionType(
        name="edm_v_prediction",
        clean=_edm_v_clean,
        output=partial(_edm_output, sign=-1),
        noise=_noise_of(_edm_v_clean),
        defined_without_signal=False,
    ),
)

PREDICTIONS: Mapping[str, PredictionType] = MappingProxyType({row.name: row for row in _ROWS})
"""All prediction types by name."""


def prediction_type(name: str) -> PredictionType:
    """Return the prediction type of a name.

    Raises:
        SettingsError: there is no such type.
    """
    if name not in PREDICTIONS:
        raise SettingsError(f"unknown prediction {name!r}: choose from {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]
