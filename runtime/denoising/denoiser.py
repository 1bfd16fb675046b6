"""The denoiser of an engine: guidance and prediction type around a UNet."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.denoising.step_engines import ConditionedDenoiser
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.schedule import NoiseLevel, Prediction

__all__ = ["EngineDenoiser", "rescale_guidance"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class EngineDenoiser:
    """Map a noisy latent (batch, channels, h, w) and its noise level to the clean latent.

    Attributes:
        unet: told of the prompts, a row an image; with guidance, of the negative ones before them.
        guided: whether there is guidance.
        prediction: what the UNet was trained to give.
        scale: guidance scale w of Ho and Salimans (2022), equation 6, where 1 is no guidance.
        rescale: phi of Lin et al. (2023), arXiv 2305.08891, equation 16; 0 is none.
        around: further channels of the sample, (batch, more, h, w): what an inpainting UNet is
            told of the picture that it paints into.
        interval: the least and the most sigma of a level that has guidance; elsewhere the UNet
            sees the prompts alone, a row an image. Kynkaanniemi et al. (2024), arXiv 2404.07724.
        cached_steps: levels at which the UNet goes on from its last deep feature.
    """

    unet: ConditionedDenoiser
    guided: bool
    prediction: Prediction
    scale: float
    rescale: float
    around: Array | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    cached_steps: frozenset[NoiseLevel] = frozenset()

    def __call__(self, x: Array, level: NoiseLevel) -> Array:
        """The clean latent that the UNet sees in x = alpha * clean + sigma * noise.

        Raises:
            SettingsError: the noise is known and nothing else is there to be told.
        """
        if self.prediction == "epsilon" and level.alpha == 0:
            raise SettingsError(
                "this model predicts noise and its schedule starts from nothing else: "
                "take a sampler that starts just below, such as euler or dpmpp_2m"
            )
        output = self._predict(x, level)
        if self.prediction == "epsilon":
            return np.asarray((x - level.sigma * output) / level.alpha, np.float32)
        return level.alpha * x - level.sigma * output

    def _predict(self, x: Array, level: NoiseLevel) -> Array:
        sample = x if self.around is None else np.concatenate([x, self.around], axis=1)
        least, most = self.interval
        guided = self.guided and least <= level.sigma <= most
        rows = np.concatenate([sample, sample]) if guided else sample
        output = self.unet.predict(rows, level.timestep, shallow=level in self.cached_steps)
        if not guided:
            return output
        negative, positive = np.split(output, 2)
        mixed = negative + self.scale * (positive - negative)
        return rescale_guidance(mixed, positive, self.rescale) if self.rescale else mixed


def rescale_guidance(guided: Array, positive: Array, phi: float) -> Array:
    """Bring guided back to the spread of positive, by the fraction phi.

    Lin et al. (2023), arXiv 2305.08891, equations 14 to 16; each sample has its own spread.
    """
    axes = tuple(range(1, guided.ndim))
    wanted, found = (a.std(axis=axes, keepdims=True) for a in (positive, guided))
    ratio: Array = np.divide(wanted, found, out=np.ones_like(found), where=found > 0)
    return guided * (phi * ratio + (1 - phi))
