"""Requests that fit a model by the channels of images that its denoiser takes."""

from __future__ import annotations

from latentforge.runtime.denoising.depth import DepthInput
from latentforge.runtime.denoising.initial_latents import ImageInput, Picture, is_latents
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Conditioning, Manifest
from latentforge.runtime.settings import Settings

__all__ = ["check_images"]


def check_images(
    manifest: Manifest,
    settings: Settings,
    *,
    image: ImageInput | None,
    mask: Picture | None,
    depth_map: DepthInput | None,
) -> None:
    """Refuse images and settings that have no meaning for a model, and demand those that it needs.

    Raises:
        SettingsError: the request lacks an image, or has one or a setting that does not apply.
    """
    conditioning = manifest.conditioning
    channels = conditioning.channels
    if conditioning.requires_image and image is None:
        raise SettingsError("this model works on an image: give image (--image)")
    if "depth" in channels and depth_map is None:
        raise SettingsError(
            "this model needs a depth map, and its depth estimator is not exported: give depth_map "
            "(--depth-map)"
        )
    if "depth" not in channels and depth_map is not None:
        raise SettingsError("this model takes no depth map: omit depth_map")
    if conditioning.requires_image and mask is not None:
        raise SettingsError("this model works on whole images: omit the mask")
    if "image" not in channels and settings.image_guidance_scale != 1:
        raise SettingsError("image_guidance_scale is for models that edit an image: omit it")
    _check_noise_level(conditioning, settings)
    if not conditioning.starts_from_image:
        if is_latents(image, manifest.latent) or settings.denoising_start is not None:
            raise SettingsError("this model cannot continue from latents: pass an image")
        if settings.strength != 1:
            raise SettingsError(
                "strength does not apply to this model, which samples from noise: omit it"
            )
    elif image is None and settings.strength != 1:
        raise SettingsError(
            "strength is that of changes to an initial image: give the image that these settings "
            "were completed for"
        )


def _check_noise_level(conditioning: Conditioning, settings: Settings) -> None:
    augmentation, level = conditioning.noise_augmentation, settings.noise_level
    if augmentation is None and level != 0:
        raise SettingsError("noise_level is for models that enlarge an image: omit it")
    if augmentation is not None and level > augmentation.max_level:
        raise SettingsError(
            f"noise_level is at most {augmentation.max_level} for this model, not {level}"
        )
