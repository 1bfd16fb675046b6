"""Denoiser of the samplers: guidance and prediction type around the network."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.acceleration import StepPolicy
from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.denoising.step_engines import ConditionedDenoiser
from latentforge.runtime.errors import BackendError
from latentforge.runtime.sampling.levels import NoiseLevel
from latentforge.runtime.sampling.prediction import Prediction, prediction_type

__all__ = ["EngineDenoiser"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class EngineDenoiser:
    """Map from a noisy latent (batch, channels, h, w) and its noise level to the clean latent.

    Attributes:
        network: bound to the conditioning, with the rows that guidance needs.
        prediction: prediction type of the network.
        guidance: classifier-free guidance.
        policy: noise levels with guidance (Kynkaanniemi et al. 2024, arXiv 2404.07724) and with
            cached steps. At levels without guidance only the positive prompts are evaluated.
        extra_channels: (rows, channels, h, w), appended to the latent, for a network that takes
            channels of images.
    """

    network: ConditionedDenoiser
    prediction: Prediction
    guidance: Guidance = Guidance()
    policy: StepPolicy = StepPolicy()
    extra_channels: Array | None = None

    def __call__(self, x: Array, level: NoiseLevel) -> Array:
        """Return the estimate of the clean latent in x = alpha * clean + sigma * noise.

        Raises:
            SettingsError: the network's output does not determine it at this level.
            BackendError: the network's output has another shape than the latents.
        """
        prediction = prediction_type(self.prediction)
        prediction.check(level)
        return prediction.clean(x, self._predict(x, level), level)

    def _predict(self, x: Array, level: NoiseLevel) -> Array:
        guided = self.guidance.rows > 1 and self.policy.applies_guidance(level)
        sample = np.concatenate([x] * self.guidance.rows) if guided else x
        if self.extra_channels is not None:
            extra = self.extra_channels[-len(sample) :]
            sample = np.concatenate([sample, extra], axis=1)
        cached = self.policy.is_cached(level)
        output = self.network.predict(sample, level.timestep, cached=cached)
        expected = (len(sample), *x.shape[1:])
        if output.shape != expected:
            raise BackendError(
                f"denoiser: its output has the shape {list(output.shape)}, but latents need "
                f"{list(expected)}: the graph is not the one that was exported; export it again"
            )
        return self.guidance.mix(output) if guided else output
