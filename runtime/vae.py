"""VAE of a latent diffusion model: images to latents and back."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.engine import Engines
from latentforge.runtime.errors import BackendError
from latentforge.runtime.manifest import Latent

__all__ = ["Draw", "Posterior", "Vae"]

Array = NDArray[np.float32]

Draw = Callable[[tuple[int, ...]], Array]
"""Draws standard normal noise of a shape."""

_LOG_VARIANCE = -30.0, 20.0  # range to which diffusers clips the encoder's log variance


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Gaussian distribution of the latents of images, as the VAE encoder returns it.

    Attributes:
        parameters: mean and log variance, stacked by channel, (n, 2 * channels, h, w), or latents
            (n, channels, h, w) of an encoder without a variance, for which no noise is drawn.
        latent: the latent space.
    """

    parameters: Array
    latent: Latent

    @property
    def mean(self) -> Array:
        """Mean (n, channels, h, w), not scaled."""
        return self.parameters[:, : self.latent.channels]

    def repeated(self, samples: int) -> "Posterior":
        """Return the distributions with each in this many consecutive rows, to sample apart."""
        return replace(self, parameters=self.parameters.repeat(samples, axis=0))

    def sample(self, draw: Draw) -> Array:
        """Return latents (n, channels, h, w), scaled for the denoiser.

        Args:
            draw: standard normal noise of a shape.
        """
        latents, log_variance = self.mean, self.parameters[:, self.latent.channels :]
        if log_variance.size:
            deviation = np.exp(np.float32(0.5) * np.clip(log_variance, *_LOG_VARIANCE))
            latents = latents + deviation * draw(latents.shape)
        return latents * np.float32(self.latent.scaling_factor)


@dataclass(frozen=True, kw_only=True)
class Vae:
    """VAE engines and the scaling of their latent space.

    Attributes:
        latent: the latent space.
        engines: hold vae_decoder, and load vae_encoder when it is first used.
    """

    latent: Latent
    engines: Engines

    def encode(self, pixels: Array) -> Posterior:
        """Return the distribution of the latents of images (n, 3, height, width) in -1..1."""
        outputs = self.engines.load("vae_encoder").run({"sample": pixels})
        return Posterior(parameters=outputs["latent_parameters"], latent=self.latent)

    def decode(self, latents: Array) -> Array:
        """Return images (n, 3, height, width) of latents, about -1..1 and not clipped.

        Raises:
            BackendError: the decoder returns something else, though its manifest agrees.
        """
        scaled = latents / np.float32(self.latent.scaling_factor)
        pixels = self.engines["vae_decoder"].run({"latent_sample": scaled})["sample"]
        rows, _, *sides = latents.shape
        expected = (rows, 3, *(side * self.latent.downscale for side in sides))
        if pixels.shape != expected or pixels.dtype.kind != "f":
            found = f"{pixels.dtype}{list(pixels.shape)}"
            raise BackendError(
                f"vae_decoder: output sample is {found}, expected float32{list(expected)}"
            )
        return pixels
