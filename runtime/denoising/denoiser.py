"""Denoiser of the samplers: guidance and prediction type around the network."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.acceleration import StepPolicy
from latentforge.runtime.denoising.step_engines import ConditionedDenoiser
from latentforge.runtime.sampling.levels import NoiseLevel
from latentforge.runtime.sampling.prediction import Prediction, prediction_type

__all__ = ["EngineDenoiser", "rescale_guidance"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class EngineDenoiser:
    """Map from a noisy latent (batch, channels, h, w) and its noise level to the clean latent.

    Attributes:
        network: bound to the conditioning, one row per image; with classifier-free guidance the
            rows of the negative prompts come first.
        prediction: prediction type of the network.
        guidance: True for classifier-free guidance.
        scale: guidance scale w of Ho and Salimans (2022), equation 6; 1 has no effect.
        rescale: phi of Lin et al. (2023), arXiv 2305.08891, equation 16; 0 has no effect.
        policy: noise levels with guidance (Kynkaanniemi et al. 2024, arXiv 2404.07724) and with
            cached steps. At levels without guidance only the positive prompts are evaluated.
        extra_channels: (batch, channels, h, w), appended to the latent for an inpainting network:
            the mask and the latents of the masked image.
    """

    network: ConditionedDenoiser
    prediction: Prediction
    guidance: bool
    scale: float
    rescale: float
    policy: StepPolicy = StepPolicy()
    extra_channels: Array | None = None

    def __call__(self, x: Array, level: NoiseLevel) -> Array:
        """Return the estimate of the clean latent in x = alpha * clean + sigma * noise.

        Raises:
            SettingsError: the network's output does not determine it at this level.
        """
        prediction = prediction_type(self.prediction)
        prediction.check(level)
        return prediction.clean(x, self._predict(x, level), level)

    def _predict(self, x: Array, level: NoiseLevel) -> Array:
        extra = self.extra_channels
        sample = x if extra is None else np.concatenate([x, extra], axis=1)
        guidance = self.guidance and self.policy.applies_guidance(level)
        rows = np.concatenate([sample, sample]) if guidance else sample
        cached = self.policy.is_cached(level)
        output = self.network.predict(rows, level.timestep, cached=cached)
        if not guidance:
            return output
        negative, positive = np.split(output, 2)
        mixed = negative + self.scale * (positive - negative)
        return rescale_guidance(mixed, positive, self.rescale) if self.rescale else mixed


def rescale_guidance(mixed: Array, positive: Array, phi: float) -> Array:
    """Rescale a guided output towards the standard deviation of the positive output.

    Lin et al. (2023), arXiv 2305.08891, equations 14 to 16; per sample.

    Args:
        mixed: output with guidance, (batch, channels, h, w).
        positive: output for the positive prompts, of the same shape.
        phi: 0 leaves `mixed` unchanged, 1 gives it the standard deviation of `positive`.
    """
    axes = tuple(range(1, mixed.ndim))
    target, present = (a.std(axis=axes, keepdims=True) for a in (positive, mixed))
    ratio: Array = np.divide(target, present, out=np.ones_like(present), where=present > 0)
    return mixed * (phi * ratio + (1 - phi))
