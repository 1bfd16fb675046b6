"""Resolved requests: everything about a request that is known before any engine runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime import sampling
from latentforge.runtime.acceleration import StepPolicy
from latentforge.runtime.conditioning.encode import ConditioningInputs
from latentforge.runtime.conditioning.image_requirements import check_images
from latentforge.runtime.denoising.depth import DepthInput, depth_channel
from latentforge.runtime.denoising.initial_latents import ImageInput, InitImage, Picture
from latentforge.runtime.errors import ManifestError, SettingsError, ShapeError
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import CACHED_FEATURE, Component, Latent, Manifest
from latentforge.runtime.sampling.levels import NoisePlan
from latentforge.runtime.settings import Settings

__all__ = ["ResolvedRequest", "check_size", "warn_of_calibration"]

Array = NDArray[np.float32]

_log = escaping_logger("latentforge")


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """Request that these engines can fulfil.

    Attributes:
        settings: complete settings.
        init: initial image, mask or latents.
        plan: noise levels to visit, after strength and denoising_start or denoising_end.
        policy: noise levels with guidance and with cached steps.
        conditioning: replaces the encoded prompts, if the caller has conditioning inputs.
        max_rows: largest micro-batch of a denoiser step; None: as the engines were loaded.
    """

    settings: Settings
    init: InitImage
    plan: NoisePlan
    policy: StepPolicy
    conditioning: ConditioningInputs | None = None
    max_rows: int | None = None

    @classmethod
    def of(
        cls,
        settings: Settings,
        manifest: Manifest,
        *,
        image: ImageInput | None = None,
        mask: Picture | None = None,
        depth_map: DepthInput | None = None,
        conditioning: ConditioningInputs | None = None,
        max_rows: int | None = None,
    ) -> ResolvedRequest:
        """Check that the engines of a manifest can fulfil a request, and plan it.

        No engine is loaded, so that a server can refuse a request before it queues it.

        Args:
            settings: complete settings.
            manifest: of the engines.
            image, mask, depth_map, conditioning, max_rows: see Pipeline.run().

        Raises:
            SettingsError: the engines lack a component that the settings name, or the image, the
                mask or the schedule do not fit the settings.
            ShapeError: the engines cannot make images of this size.
            ManifestError: an image needs the VAE encoder, which the engines lack.
        """
        check_size(settings, manifest)
        for name in _step_components(settings):
            if name not in manifest.components:
                raise SettingsError(
                    f"these engines have no {name}: omit the setting that needs it, or build "
                    "with --fast"
                )
        if settings.cached_steps:
            _check_feature(settings, manifest)
        check_images(manifest, settings, image=image, mask=mask, depth_map=depth_map)
        init = InitImage.of(image, mask, settings, manifest.latent, shrink=manifest.shrink)
        if depth_map is not None:
            init = replace(init, depth=_depth(depth_map, settings, manifest.latent))
        if init.mask is not None and manifest.latent.masked_decoder:
            raise SettingsError(
                "the decoder of an AsymmetricAutoencoderKL takes image and mask in inpainting, "
                "which is not supported: omit the mask, or export the checkpoint with another vae"
            )
        encodes = init.pixels is not None and manifest.conditioning.encodes_images
        if encodes and "vae_encoder" not in manifest.components:
            raise ManifestError("these engines have no vae_encoder, which images need: export it")
        plan = sampling.noise_plan(
            settings.sampler, manifest.schedule, settings.steps, settings.timesteps
        )
        return cls(
            settings=settings,
            init=init,
            plan=_part(plan, settings, manifest.schedule.train_steps),
            policy=StepPolicy.of(settings.guidance_interval, settings.cached_steps, plan),
            conditioning=conditioning,
            max_rows=max_rows,
        )

    @property
    def step_components(self) -> tuple[str, ...]:
        """Components that run in the steps of this request."""
        return _step_components(self.settings)


def _depth(depth_map: DepthInput, settings: Settings, latent: Latent) -> Array:
    height, width = settings.height // latent.downscale, settings.width // latent.downscale
    depth = depth_channel(depth_map, height=height, width=width)
    if len(depth) not in (1, len(settings.prompts)):
        raise SettingsError(
            f"{len(depth)} depth maps for {len(settings.prompts)} prompts: give one for all, or "
            "one for each"
        )
    return depth


def _step_components(settings: Settings) -> tuple[str, ...]:
    cached = ("denoiser_cached",) if settings.cached_steps else ()
    return (settings.variant, *cached)


def _check_feature(settings: Settings, manifest: Manifest) -> None:
    """Check that the sides of a cached feature, a fraction of the latents' sides, are whole.

    Raises:
        ShapeError: they are not.
    """
    component = manifest.components.get("denoiser_cached")
    spec = component.inputs.get(CACHED_FEATURE) if component is not None else None
    divisors = [int(str(size).partition("//")[2] or 1) for size in spec.shape] if spec else [1]
    unit = manifest.latent.downscale * max(divisors)
    for name, side in (("height", settings.height), ("width", settings.width)):
        if side % unit:
            raise ShapeError(
                f"{name} must be a multiple of {unit} for cached steps, not {side}: request that, "
                "or no cached steps (unaccelerated)"
            )


def _part(plan: NoisePlan, settings: Settings, train_steps: int) -> NoisePlan:
    """Return the part of a complete plan that the request runs."""
    if settings.denoising_start is None and settings.denoising_end is None:
        return plan.of_strength(settings.strength)
    start = 0.0 if settings.denoising_start is None else settings.denoising_start
    end = 1.0 if settings.denoising_end is None else settings.denoising_end
    return plan.between(train_steps, start=start, end=end)


def check_size(settings: Settings, manifest: Manifest) -> None:
    """Check that the denoiser of a manifest can make images of the request's size.

    Raises:
        ShapeError: it cannot; the message has the sizes that it can.
    """
    latent = manifest.latent
    unit = latent.downscale * latent.multiple
    for name, side in (("height", settings.height), ("width", settings.width)):
        if side % unit:
            raise ShapeError(f"{name} must be a multiple of {unit} for this model, not {side}")
    sizes = latent.image_sizes(manifest.components["denoiser"])
    if sizes and not any(settings.height in h and settings.width in w for h, w in sizes):
        supported = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ShapeError(
            f"these engines make images of {supported} pixels (height x width), not "
            f"{settings.height}x{settings.width}: request one of these, or build engines for it"
        )


def warn_of_calibration(settings: Settings, denoiser: Component) -> None:
    """Log a warning if 8-bit engines were calibrated for another schedule than the request's."""
    calibrated = denoiser.calibration
    if calibrated is None:
        return
    if (calibrated.sampler, calibrated.steps) != (settings.sampler, settings.steps):
        _log.warning(
            "the 8-bit engines were calibrated for %s with %d steps, and this request is %s with "
            "%d: for the best images optimize the exported engines again, with --sampler and "
            "--steps",
            calibrated.sampler, calibrated.steps, settings.sampler, settings.steps,
        )  # fmt: skip
