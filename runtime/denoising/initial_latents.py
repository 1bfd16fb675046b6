"""What sampling starts from: noise alone, a picture, or the part of a picture under a mask.

The order in which random numbers are drawn is that of diffusers' pipelines, so that a seed means
the same picture: the picture's own latents first, then the noise, then the latents of what the
mask leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.image import to_array, to_mask
from latentforge.runtime.manifest import Latent
from latentforge.runtime.sampling.samplers import Keep
from latentforge.runtime.sampling.schedule import NoiseLevel, NoisePlan
from latentforge.runtime.settings import Settings

__all__ = [
    "InitialState",
    "Picture",
    "InitImage",
    "LatentInitializer",
    "sample_posterior",
    "size_of",
]

Array = NDArray[np.float32]
Picture: TypeAlias = "Image.Image | Sequence[Image.Image] | Array"
"""A picture, one for each prompt, or latents (images, channels, h, w)."""

Draw = Callable[[tuple[int, ...]], Array]

_LANCZOS = Image.Resampling.LANCZOS
_LOG_VARIANCE = -30.0, 20.0  # what diffusers clips the encoder's log variance to


@dataclass(frozen=True, kw_only=True)
class InitImage:
    """What the caller gave to start from.

    Attributes:
        pixels: pictures (n, 3, height, width) in -1..1, n being 1 or the number of prompts.
        mask: (1, 1, height, width), 1 where to paint and 0 what to keep.
        latents: (images, channels, h, w), in place of pixels.
    """

    pixels: Array | None = None
    mask: Array | None = None
    latents: Array | None = None

    @classmethod
    def of(
        cls, image: Picture | None, mask: Image.Image | None, settings: Settings, latent: Latent
    ) -> InitImage:
        """Bring what was given to the request's size.

        Raises:
            SettingsError: it is no picture, or something is missing or too much.
            ShapeError: mask and picture, or latents and request, are of different sizes.
        """
        if isinstance(image, np.ndarray):
            return cls(latents=_latents(image, mask, settings, latent))
        if settings.denoising_start is not None:
            raise SettingsError("denoising_start goes on from latents: give those as the image")
        if mask is not None:
            _check_mask(mask, image)
        size = (settings.width, settings.height)
        return cls(
            pixels=None if image is None else _pixels(_listed(image), settings),
            mask=None if mask is None else to_mask(mask.resize(size, _LANCZOS)),
        )


@dataclass(frozen=True, kw_only=True)
class InitialState:
    """What the sampler works on.

    Attributes:
        latents: to start from, at the level where the plan starts; noise if None.
        around: further channels for an inpainting UNet: the mask and what it leaves.
        keep: puts back, after each step, what is not to be painted.
    """

    latents: Array | None = None
    around: Array | None = None
    keep: Keep | None = None


def size_of(image: Picture, latent: Latent) -> tuple[int, int]:
    """Height and width in pixels to work at: the picture's, cut to what the model can do."""
    if isinstance(image, np.ndarray):
        if image.ndim != 4:
            raise ShapeError(f"latents are (images, channels, h, w), not of shape {image.shape}")
        return image.shape[-2] * latent.downscale, image.shape[-1] * latent.downscale
    unit = latent.downscale * latent.multiple
    width, height = _listed(image)[0].size
    if min(height, width) < unit:
        raise ShapeError(
            f"the picture is {width}x{height} pixels, and {unit}x{unit} is the least for this model"
        )
    return height // unit * unit, width // unit * unit


@dataclass(frozen=True, kw_only=True)
class LatentInitializer:
    """Makes canvases, drawing random numbers as diffusers does.

    Attributes:
        settings: the request.
        plan: of the sampler, what strength leaves of it.
        shape: of the latents, (images, channels, h, w).
        inpainting_channels: whether the UNet takes mask and picture as further channels.
        draw: standard normal noise of a shape.
        encode: pixels to latents, drawing from the same noise.
    """

    settings: Settings
    plan: NoisePlan
    shape: tuple[int, int, int, int]
    inpainting_channels: bool
    draw: Draw
    encode: Callable[[Array], Array]

    def prepare(self, source: InitImage) -> InitialState:
        """Everything that a run starts with."""
        if source.mask is not None or (self.inpainting_channels and source.latents is None):
            return self._masked(source)
        if source.latents is not None and self.settings.denoising_start is not None:
            return InitialState(latents=source.latents)
        if source.latents is not None:
            return InitialState(latents=self._noised(source.latents, self.draw(self.shape)))
        if source.pixels is None:
            return InitialState()
        clean = self._encoded(source.pixels)
        return InitialState(latents=self._noised(clean, self.draw(self.shape)))

    def _masked(self, source: InitImage) -> InitialState:
        """Inpainting. An inpainting UNet without a picture paints a whole one."""
        blank = np.zeros((1, 3, self.settings.height, self.settings.width), np.float32)
        pixels = blank if source.pixels is None else source.pixels
        mask = np.ones_like(blank[:, :1]) if source.mask is None else source.mask
        from_noise = self.settings.strength == 1
        clean = blank if from_noise and self.inpainting_channels else self._encoded(pixels)
        noise = self.draw(self.shape)
        latents = noise * np.float32(self.plan.scale) if from_noise else self._noised(clean, noise)
        left = self._encoded(pixels * (mask < 0.5))  # drawn for even where nobody needs it
        factor = self.settings.height // self.shape[2]
        small = mask[:, :, ::factor, ::factor]
        if not self.inpainting_channels:
            return InitialState(latents=latents, keep=_keeping(clean, noise, small))
        around = np.concatenate([small.repeat(self.shape[0], axis=0), left], axis=1)
        return InitialState(latents=latents, around=around)

    def _encoded(self, pixels: Array) -> Array:
        """Latents with a row an image: of one picture for all, or of one for each prompt."""
        latents = self.encode(pixels)
        return latents.repeat(self.shape[0] // len(latents), axis=0)

    def _noised(self, clean: Array, noise: Array) -> Array:
        return _noised(clean, noise, self.plan.intervals[0].start)


def sample_posterior(parameters: Array, latent: Latent, draw: Draw) -> Array:
    """Latents drawn from the Gaussian that the VAE encoder gave, scaled for the UNet.

    Args:
        parameters: mean and log variance, stacked by channel.
        latent: the latent space.
        draw: standard normal noise of a shape.
    """
    mean, log_variance = np.split(parameters, 2, axis=1)
    deviation = np.exp(np.float32(0.5) * np.clip(log_variance, *_LOG_VARIANCE))
    latents: Array = mean + deviation * draw(mean.shape)
    return latents * np.float32(latent.scaling_factor)


def _keeping(clean: Array, noise: Array, mask: Array) -> Keep:
    """Put the picture, noised to the same level, back where the mask is 0."""

    def keep(latents: Array, level: NoiseLevel) -> Array:
        return (1 - mask) * _noised(clean, noise, level) + mask * latents

    return keep


def _noised(clean: Array, noise: Array, level: NoiseLevel) -> Array:
    return np.float32(level.alpha) * clean + np.float32(level.sigma) * noise


def _listed(image: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    pictures = [image] if isinstance(image, Image.Image) else image
    if not isinstance(pictures, Sequence) or not pictures:
        raise SettingsError(f"image is a picture of Pillow's, not {type(image).__name__}")
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            raise SettingsError(f"image is a picture of Pillow's, not {type(picture).__name__}")
    return list(pictures)


def _pixels(pictures: list[Image.Image], settings: Settings) -> Array:
    if len(pictures) not in (1, len(settings.prompts)):
        raise SettingsError(
            f"{len(pictures)} pictures for {len(settings.prompts)} prompts: give one or as many"
        )
    size = (settings.width, settings.height)  # palettes can't be mixed, so colours come first
    return to_array([picture.convert("RGB").resize(size, _LANCZOS) for picture in pictures])


def _check_mask(mask: Image.Image, image: Image.Image | Sequence[Image.Image] | None) -> None:
    if image is None:
        raise SettingsError("a mask says which part of a picture to paint: give image too")
    if not isinstance(mask, Image.Image):
        raise SettingsError(f"mask is a picture of Pillow's, not {type(mask).__name__}")
    for picture in _listed(image):
        if picture.size != mask.size:
            (width, height), (w, h) = picture.size, mask.size
            raise ShapeError(f"the mask is {w}x{h} and the picture {width}x{height}: make them one")


def _latents(given: Array, mask: Image.Image | None, settings: Settings, latent: Latent) -> Array:
    if mask is not None:
        raise SettingsError("a mask needs a picture, and the image given is latents")
    height, width = settings.height // latent.downscale, settings.width // latent.downscale
    shape = (settings.count, latent.channels, height, width)
    if given.shape != shape:
        raise ShapeError(f"latents of shape {given.shape} were given, and {shape} are needed")
    if not np.issubdtype(given.dtype, np.floating) or not np.isfinite(given).all():
        raise SettingsError("latents are finite numbers of a floating-point type")
    return given.astype(np.float32, copy=False)
