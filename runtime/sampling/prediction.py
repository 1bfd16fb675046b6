"""Prediction types: what a denoiser's output means, and how to convert it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

Prediction = Literal["epsilon", "v_prediction"]
"""Name of a prediction type, under the name that diffusers has for it."""


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
