"""Completion of requests: prompts and a few settings become Settings, by a manifest alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from latentforge.runtime.denoising.initial_latents import ImageInput, Picture, image_size
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.resolved_request import check_size
from latentforge.runtime.settings import Request, Settings, resolve

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["complete_request"]

_STRENGTH = 0.8  # default for an initial image without a mask, as in diffusers


def complete_request(
    manifest: Manifest,
    prompt: str | Sequence[str],
    *,
    image: ImageInput | None = None,
    mask: Picture | None = None,
    **settings: Unpack[Request],
) -> Settings:
    """Complete and check a request without any engine: see Pipeline.settings().

    ResolvedRequest.of() has the checks that a run makes besides, of the image and the mask.

    Raises:
        SettingsError: a setting is out of range, unknown, or has no effect.
        ShapeError: the engines cannot make images of this size.
    """
    request: dict[str, Any] = {k: v for k, v in settings.items() if v is not None}
    if image is not None:
        request = {**_from_image(manifest, image, masked=mask is not None), **request}
    elif "strength" in request:
        raise SettingsError("strength applies to an initial image: give image too")
    resolved = resolve(manifest.defaults, prompt, cast("Request", request), manifest.acceleration)
    if request.get("image_guidance_scale", 1) != 1 and not resolved.uses_guidance:
        raise SettingsError(
            "image_guidance_scale takes effect with a guidance_scale above 1: raise that, or "
            "omit image_guidance_scale"
        )
    check_size(resolved, manifest)
    return resolved


def _from_image(manifest: Manifest, image: ImageInput, *, masked: bool) -> dict[str, Any]:
    """Return the settings that follow from an initial image where the request has none."""
    height, width = image_size(image, manifest.latent, shrink=manifest.shrink)
    starts = not masked and manifest.conditioning.starts_from_image
    return {"height": height, "width": width, "strength": _STRENGTH if starts else 1.0}
