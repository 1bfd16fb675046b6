"""Initial latents of a run: from noise, from an image, or from the masked part of an image.

They come with the channels of images that some denoisers take besides the latents.

Random numbers are drawn in the order of diffusers' pipelines, so that a seed gives the same image:
the posterior of the image first, then the noise, then the posterior of the masked image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.image import read_image, to_array, to_mask
from latentforge.runtime.manifest import Conditioning, Latent
from latentforge.runtime.rng import NoiseSource
from latentforge.runtime.sampling.levels import NoiseLevel, NoisePlan
from latentforge.runtime.sampling.sampler import MaskBlend
from latentforge.runtime.settings import Settings
from latentforge.runtime.vae import Posterior

__all__ = [
    "ImageInput",
    "InitImage",
    "InitialState",
    "LatentInitializer",
    "Picture",
    "image_size",
    "is_latents",
]

Array = NDArray[np.float32]
Picture: TypeAlias = "Image.Image | str | Path | NDArray[Any]"
"""PIL image, path of a file, or array: see image.read_image()."""

ImageInput: TypeAlias = "Picture | Sequence[Picture]"
"""Initial image: one for all prompts, one per prompt, or latents (images, channels, h, w)."""

_LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True, kw_only=True)
class InitImage:
    """Initial image and mask of a request, checked and resized.

    Attributes:
        pixels: images (n, 3, height, width) in -1..1; n is 1 or the number of prompts.
        mask: (1, 1, height, width), 1 where to paint and 0 where to keep the image.
        latents: (images, channels, h, w), instead of pixels.
        depth: depth maps (n, 1, h, w) in -1..1, of the size of the latents.
    """

    pixels: Array | None = None
    mask: Array | None = None
    latents: Array | None = None
    depth: Array | None = None

    @classmethod
    def of(
        cls,
        image: ImageInput | None,
        mask: Picture | None,
        settings: Settings,
        latent: Latent,
        *,
        shrink: int = 1,
    ) -> InitImage:
        """Check an image and a mask, and resize them to the request's size.

        Args:
            image, mask: as given by the user.
            settings: of the request.
            latent: the latent space.
            shrink: factor by which the image is smaller than the result.

        Raises:
            SettingsError: one is not an image, or the request lacks one or has one too many.
            ShapeError: mask and image, or latents and request, differ in size.
        """
        if is_latents(image, latent):
            return cls(latents=_check_latents(image, mask, settings, latent))
        if settings.denoising_start is not None:
            raise SettingsError("denoising_start continues from latents: pass them as the image")
        if image is None and mask is not None:
            raise SettingsError("a mask marks the part of an image to paint: give image too")
        images = [] if image is None else _images(image)
        return cls(
            pixels=_pixels(images, settings, shrink) if images else None,
            mask=None if mask is None else _mask(mask, images, settings),
        )


@dataclass(frozen=True, kw_only=True)
class InitialState:
    """Starting point of the sampler.

    Attributes:
        latents: at the noise level where the plan starts; None for noise alone.
        extra_channels: further input channels of the denoiser, (images, channels, h, w).
        mask_blend: puts the image back outside of the mask after each step.
    """

    latents: Array | None = None
    extra_channels: Array | None = None
    mask_blend: MaskBlend | None = None


def image_size(image: ImageInput, latent: Latent, *, shrink: int = 1) -> tuple[int, int]:
    """Return the height and width in pixels to work at: the image's, rounded down as needed.

    Args:
        image: as given by the user.
        latent: the latent space.
        shrink: factor by which the image is smaller than the result.

    Raises:
        ShapeError: the image is smaller than the model's smallest.
        SettingsError: it is not an image.
    """
    if is_latents(image, latent):
        return image.shape[-2] * latent.downscale, image.shape[-1] * latent.downscale
    unit = latent.downscale * latent.multiple // shrink
    width, height = _images(image)[0].size
    if min(height, width) < unit:
        raise ShapeError(
            f"the image is {width}x{height} pixels, and this model needs at least {unit}x{unit}"
        )
    return height // unit * unit * shrink, width // unit * unit * shrink


@dataclass(frozen=True, kw_only=True)
class LatentInitializer:
    """Source of the initial state of one run.

    Attributes:
        settings: the request.
        plan: noise plan of the run; its strength is already applied.
        shape: of the latents, (images, channels, h, w).
        conditioning: of the model, with the channels of images that the denoiser takes.
        noise: standard normal noise.
        encode: pixels to the distribution of their latents.
    """

    settings: Settings
    plan: NoisePlan
    shape: tuple[int, int, int, int]
    conditioning: Conditioning
    noise: NoiseSource
    encode: Callable[[Array], Posterior]

    def prepare(self, init: InitImage) -> InitialState:
        """Return the initial state for an initial image, mask or latents, or for none."""
        channels = self.conditioning.channels
        if init.mask is not None or ("mask" in channels and init.latents is None):
            return self._masked(init)
        if init.pixels is not None and "image" in channels:
            return InitialState(extra_channels=self._repeated(self.encode(init.pixels).mean))
        if init.pixels is not None and self.conditioning.noise_augmentation is not None:
            level = self.conditioning.noise_augmentation.schedule.at(self.settings.noise_level)
            pixels = self._repeated(init.pixels) if self.noise.rows else init.pixels
            noisy = _noised(pixels, self.noise.randn(pixels.shape), level)
            return InitialState(extra_channels=self._repeated(noisy))
        extra = None if init.depth is None else self._repeated(init.depth)
        return InitialState(latents=self._start(init), extra_channels=extra)

    def _start(self, init: InitImage) -> Array | None:
        """Return the latents of an image, noised, or those that were passed."""
        if init.latents is not None and self.settings.denoising_start is not None:
            return init.latents
        if init.latents is not None:
            return self._noised(init.latents, self.noise.randn(self.shape))
        if init.pixels is None:
            return None
        clean = self._encoded(init.pixels)
        return self._noised(clean, self.noise.randn(self.shape))

    def _masked(self, init: InitImage) -> InitialState:
        """Prepare inpainting. Without an image, an inpainting denoiser paints all of it."""
        blank = np.zeros((1, 3, self.settings.height, self.settings.width), np.float32)
        pixels = blank if init.pixels is None else init.pixels
        mask = np.ones_like(blank[:, :1]) if init.mask is None else init.mask
        from_noise = self.settings.strength == 1
        clean = blank if from_noise and self.conditioning.channels else self._encoded(pixels)
        noise = self.noise.randn(self.shape)
        latents = noise * np.float32(self.plan.scale) if from_noise else self._noised(clean, noise)
        # Encoded even where it is not used: diffusers draws random numbers for it.
        masked_image = self._encoded(pixels * (mask < 0.5))
        factor = self.settings.height // self.shape[2]
        small = mask[:, :, ::factor, ::factor]
        if not self.conditioning.channels:
            return InitialState(latents=latents, mask_blend=_mask_blend(clean, noise, small))
        extra = np.concatenate([small.repeat(self.shape[0], axis=0), masked_image], axis=1)
        return InitialState(latents=latents, extra_channels=extra)

    def _encoded(self, pixels: Array) -> Array:
        """Return latents, one row per image of the request."""
        posterior = self.encode(pixels)
        if self.noise.rows is not None:
            posterior = posterior.repeated(self.noise.rows // len(pixels))
        return self._repeated(posterior.sample(self.noise.randn))

    def _repeated(self, rows: Array) -> Array:
        return rows.repeat(self.shape[0] // len(rows), axis=0)

    def _noised(self, clean: Array, noise: Array) -> Array:
        return _noised(clean, noise, self.plan.intervals[0].start)


def _mask_blend(clean: Array, noise: Array, mask: Array) -> MaskBlend:
    """Return a callback that puts the image, noised to the same level, back where mask is 0."""

    def blend(latents: Array, level: NoiseLevel) -> Array:
        return (1 - mask) * _noised(clean, noise, level) + mask * latents

    return blend


def _noised(clean: Array, noise: Array, level: NoiseLevel) -> Array:
    return np.float32(level.alpha) * clean + np.float32(level.sigma) * noise


def is_latents(image: ImageInput | None, latent: Latent) -> TypeGuard[NDArray[Any]]:
    """Return True for an array of four dimensions, unless it is a batch of pictures."""
    if not isinstance(image, np.ndarray) or image.ndim != 4:
        return False
    if image.dtype in (np.uint8, np.uint16, np.bool_):
        return False
    return image.shape[3] not in (1, 3, 4) or image.shape[1] == latent.channels


def _images(image: ImageInput) -> list[Image.Image]:
    batch = image.ndim == 4 if isinstance(image, np.ndarray) else isinstance(image, list | tuple)
    images: Sequence[Any] = image if batch else [image]  # type: ignore[assignment]
    if len(images) == 0:
        raise SettingsError("image is empty: give a picture for all prompts, or one for each")
    return [read_image("image", item) for item in images]


def _pixels(images: list[Image.Image], settings: Settings, shrink: int) -> Array:
    if len(images) not in (1, len(settings.prompts)):
        raise SettingsError(
            f"{len(images)} images for {len(settings.prompts)} prompts: give one for all, or one "
            "for each"
        )
    size = (settings.width // shrink, settings.height // shrink)
    # Converted before resizing: colours of a palette cannot be interpolated.
    return to_array([image.convert("RGB").resize(size, _LANCZOS) for image in images])


def _mask(mask: Picture, images: Sequence[Image.Image], settings: Settings) -> Array:
    picture = read_image("mask", mask)
    for image in images:
        if image.size != picture.size:
            (width, height), (w, h) = image.size, picture.size
            raise ShapeError(
                f"the mask is {w}x{h} and the image {width}x{height}: they must be of one size"
            )
    return to_mask(picture.resize((settings.width, settings.height), _LANCZOS))


def _check_latents(
    latents: NDArray[Any], mask: Picture | None, settings: Settings, latent: Latent
) -> Array:
    if mask is not None:
        raise SettingsError("a mask needs an image, and latents were passed instead")
    height, width = settings.height // latent.downscale, settings.width // latent.downscale
    shape = (settings.count, latent.channels, height, width)
    if latents.shape != shape:
        raise ShapeError(f"latents have shape {latents.shape}, and the request needs {shape}")
    if not np.issubdtype(latents.dtype, np.floating) or not np.isfinite(latents).all():
        raise SettingsError("latents must be finite numbers of a floating-point type")
    return latents.astype(np.float32, copy=False)
