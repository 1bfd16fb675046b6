"""Capabilities: what each model can do, and the limits of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from starlette.requests import Request
from starlette.types import ASGIApp

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.record import Record
from latentforge.runtime.sampling import SAMPLERS, noise_plan
from latentforge.runtime.settings import MAX_PROMPT
from latentforge.runtime.version import __version__
from latentforge.serve.http.context import Context
from latentforge.serve.http.endpoint import Endpoint
from latentforge.serve.http.envelope import Json
from latentforge.serve.http.fields import MAX_IMAGES
from latentforge.serve.http.openai import makes_previews
from latentforge.serve.service import ModelCard

__all__ = ["CapabilityEndpoints"]

Task = Literal["text_to_image", "image_to_image", "inpainting", "editing", "enlarging"]


class SideRange(Record, frozen=True, kw_only=True):
    """Smallest and largest side in pixels."""

    min: int
    max: int


class SizeRange(Record, frozen=True, kw_only=True):
    """Heights and widths that engines were built for."""

    height: SideRange
    width: SideRange


class DefaultSettings(Record, frozen=True, kw_only=True):
    """Settings of a request that names none."""

    size: str
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    sampler: str


class ModelCapabilities(Record, frozen=True, kw_only=True):
    """Possibilities of a model.

    Attributes:
        sizes: that the engines were built for; any multiples if empty.
        multiple: of which height and width are multiples.
        depth_map: True if requests need a depth map, which jobs take.
        previews: True if previews can be had.
        accelerated: True if the engines have an acceleration plan, for the default sampler and
            steps; unaccelerated ignores it.
    """

    id: str
    name: str
    family: str
    tasks: tuple[Task, ...]
    defaults: DefaultSettings
    sizes: tuple[SizeRange, ...]
    multiple: int
    samplers: tuple[str, ...]
    depth_map: bool
    previews: bool
    accelerated: bool
    license: str | None


class ServerLimits(Record, frozen=True, kw_only=True):
    """Limits of a request.

    Attributes:
        image_pixels: most pixels of an image that is made.
        share_seconds: time for which a shared image is kept; None if none can be shared.
    """

    images: int
    prompt_characters: int
    body_bytes: int
    picture_side: int
    picture_pixels: int
    image_pixels: int
    seconds: float
    share_seconds: float | None


class CapabilitiesAnswer(Record, frozen=True, kw_only=True):
    """Answer of GET /v1/capabilities."""

    version: str
    models: tuple[ModelCapabilities, ...]
    limits: ServerLimits
    output_formats: tuple[str, ...]


@dataclass(frozen=True)
class CapabilityEndpoints:
    """Endpoint that says what can be asked for."""

    context: Context

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return the endpoint."""
        return (
            Endpoint(
                method="GET", path="/v1/capabilities", handler=self.read, group="Server",
                summary="List what the models can do, and the limits of requests.",
                answer=CapabilitiesAnswer,
            ),
        )  # fmt: skip

    async def read(self, request: Request) -> ASGIApp:
        """Answer GET /v1/capabilities."""
        return Json(await asyncio.to_thread(lambda: self._answer))

    @cached_property
    def _answer(self) -> CapabilitiesAnswer:
        models = self.context.service.models.items()
        return CapabilitiesAnswer(
            version=__version__,
            models=tuple(_capabilities(name, model) for name, model in models),
            limits=self._limits(),
            output_formats=("png", "jpeg", "webp"),
        )

    def _limits(self) -> ServerLimits:
        options, shares = self.context.options, self.context.shares
        return ServerLimits(
            images=MAX_IMAGES,
            prompt_characters=MAX_PROMPT,
            body_bytes=options.body.bytes,
            picture_side=options.pictures.side,
            picture_pixels=options.pictures.pixels,
            image_pixels=options.image_pixels,
            seconds=options.deadline,
            share_seconds=None if shares is None else shares.lifetime,
        )


def _capabilities(id: str, model: ModelCard) -> ModelCapabilities:
    manifest = model.manifest
    return ModelCapabilities(
        id=id,
        name=manifest.name,
        family=manifest.family,
        tasks=tuple(tasks(manifest)),
        defaults=_defaults(manifest),
        sizes=_sizes(manifest),
        multiple=manifest.latent.downscale * manifest.latent.multiple,
        samplers=tuple(samplers_of(manifest)),
        depth_map="depth" in manifest.conditioning.channels,
        previews=makes_previews(model),
        accelerated=manifest.acceleration is not None,
        license=manifest.source.license,
    )


def tasks(manifest: Manifest) -> list[Task]:
    """Return the tasks of a model."""
    conditioning = manifest.conditioning
    if conditioning.noise_augmentation is not None:
        return ["enlarging"]
    if "image" in conditioning.channels:
        return ["editing"]
    found: list[Task] = [] if conditioning.requires_image else ["text_to_image"]
    if "vae_encoder" in manifest.components:
        found.append("image_to_image")
        if not (conditioning.requires_image or manifest.latent.masked_decoder):
            found.append("inpainting")
    return found


def samplers_of(manifest: Manifest) -> Iterator[str]:
    """Yield the samplers that follow a model's noise schedule."""
    for name in SAMPLERS:
        with suppress(SettingsError):
            noise_plan(name, manifest.schedule, manifest.defaults.steps)
            yield name


def _defaults(manifest: Manifest) -> DefaultSettings:
    """Return the defaults, with those that the acceleration plan replaces."""
    plan = {} if manifest.acceleration is None else manifest.acceleration.request
    defaults = manifest.defaults
    return DefaultSettings(
        size=f"{defaults.width}x{defaults.height}",
        num_inference_steps=plan.get("steps", defaults.steps),
        guidance_scale=defaults.guidance_scale,
        guidance_rescale=defaults.guidance_rescale,
        sampler=plan.get("sampler", defaults.sampler),
    )


def _sizes(manifest: Manifest) -> tuple[SizeRange, ...]:
    pairs = manifest.latent.image_sizes(manifest.components["denoiser"])
    return tuple(
        SizeRange(
            height=SideRange(min=height.min, max=height.max),
            width=SideRange(min=width.min, max=width.max),
        )
        for height, width in pairs
    )
