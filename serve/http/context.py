"""State that all endpoints share, and the steps that several of them take."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

import msgspec
from PIL import Image
from starlette.requests import Request

from latentforge.runtime.errors import LatentforgeError
from latentforge.runtime.manifest import MAX_SIDE
from latentforge.runtime.validation import check_count
from latentforge.serve.errors import (
    BadRequestError,
    ServeError,
    UnknownJobError,
    UnknownModelError,
)
from latentforge.serve.http.body import BodyLimits
from latentforge.serve.http.endpoint import TextRequest
from latentforge.serve.http.fields import ImageFields
from latentforge.serve.job import Job
from latentforge.serve.keys import ANYONE
from latentforge.serve.metrics import Metrics
from latentforge.serve.pictures import (
    ImageFormat,
    PictureLimits,
    Pixels,
    encode_image,
    image_metadata,
    resized,
)
from latentforge.serve.request import ImageRequest
from latentforge.serve.service import ModelCard, Service
from latentforge.serve.share import ShareStore

__all__ = [
    "NAMES",
    "Context",
    "HttpOptions",
    "Output",
    "Pictures",
    "complete",
    "completed",
    "owner_of",
    "settings_of",
]

NAMES: Mapping[str, str] = {
    "steps": "num_inference_steps",
    "height": "size",
    "width": "size",
    "pixels": "size",
    "samplers": "sampler",
    "images_per_prompt": "n",
    "negative": "negative_prompt",
    "depth map": "depth_map",
}
"""Fields of requests by the name that messages of the runtime have for them, where they differ."""

_NAMED = re.compile(
    r"\b(depth[_ ]map|height|width|pixels|samplers?|strength|image_guidance_scale|guidance_scale"
    r"|guidance_rescale|noise_level|seed|steps|mask|image|negative|prompt|timesteps)\b"
)

_KEY = re.compile(r"[!-~]{1,255}")

OWNER, MODEL = "latentforge.owner", "latentforge.model"
JOB, TEXT = "latentforge.job", "latentforge.prompt"
"""Entries of a request's scope."""


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Options of the HTTP interface.

    Attributes:
        body: bounds of bodies.
        pictures: bounds of pictures in them.
        image_pixels: most pixels of an image that is made.
        deadline: seconds after which a request ends that names no shorter time.
        url: address under which clients reach the server; empty for that of each request.
        metadata: False to leave the settings, and so the prompt, out of PNG files.
        log_prompts: True to have prompts in the log.

    Raises:
        SettingsError: a number is out of range.
    """

    body: BodyLimits = field(default_factory=BodyLimits)
    pictures: PictureLimits = PictureLimits()
    image_pixels: int = 4_194_304
    deadline: float = 600.0
    url: str = ""
    metadata: bool = True
    log_prompts: bool = False

    def __post_init__(self) -> None:
        check_count("max_pixels", self.image_pixels, MAX_SIDE**2)


@dataclass(frozen=True, kw_only=True)
class Output:
    """File format of images."""

    format: ImageFormat = "png"
    quality: int = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Pictures of a request, decoded."""

    image: Pixels | None = None
    mask: Pixels | None = None
    depth_map: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class Context:
    """Service with everything else that endpoints need.

    Attributes:
        service: runs requests.
        metrics: its metrics.
        options: of the interface.
        shares: images shared by links; None if none are.
        secret: signs the addresses of images, until the server ends.
    """

    service: Service
    metrics: Metrics
    options: HttpOptions = HttpOptions()
    shares: ShareStore | None = None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def model(self, name: str | None) -> tuple[str, ModelCard]:
        """Return a model with its name, or the first one.

        Raises:
            UnknownModelError: there is none of this name.
        """
        models = self.service.models
        chosen = next(iter(models)) if name is None else name
        if chosen not in models:
            listed = ", ".join(models)
            raise UnknownModelError(
                f"no model {chosen[:100]!r}: choose from {listed}", param="model"
            )
        return chosen, models[chosen]

    def job(self, id: str, request: Request) -> Job:
        """Return a job of the same owner as a request.

        Raises:
            UnknownJobError, ExpiredJobError: there is none.
        """
        job = self.service.get(id)
        if job.owner != owner_of(request):
            raise UnknownJobError("no such job: its id is in the answer to POST /v1/jobs")
        return job

    async def submit(
        self, request: Request, images: ImageRequest, fields: msgspec.Struct, seconds: float | None
    ) -> Job:
        """Hand a request to the service, with the deadline and the idempotency key that it has.

        Args:
            request: of the client.
            images: what it asks for.
            fields: its body, which tells a repetition from another request of the same key.
            seconds: until its deadline.

        Raises:
            ServeError: it is not accepted.
        """
        self._check_pixels(images)
        key = request.headers.get("idempotency-key")
        if key is not None and not _KEY.fullmatch(key):
            raise BadRequestError(
                "Idempotency-Key must be 1 to 255 visible characters of ASCII",
                param="Idempotency-Key",
            )
        request.scope[MODEL] = images.model
        if self.options.log_prompts:
            request.scope[TEXT] = images.prompt
        job = await self.service.submit(
            images,
            owner=owner_of(request),
            deadline=self._deadline(seconds),
            idempotency=None if key is None else (key, _digest(request, fields)),
        )
        request.scope[JOB] = job.id
        return job

    def refusal(self, text: TextRequest, owner: str) -> ServeError | None:
        """Return the error by which the service would refuse a request now; None if it would not.

        Raises:
            BadRequestError: its images are too large for this server.
        """
        self._check_pixels(text.images)
        seconds = self._deadline(text.seconds)
        return self.service.refusal(text.images, owner=owner, deadline=seconds)

    def _deadline(self, seconds: float | None) -> float:
        longest = self.options.deadline
        return longest if seconds is None else min(seconds, longest)

    def _check_pixels(self, images: ImageRequest) -> None:
        settings, most = images.shared, self.options.image_pixels
        if settings.height * settings.width > most:
            raise BadRequestError(
                f"images of {settings.width}x{settings.height} are too large for this server, "
                f"which makes up to {most:,} pixels: choose a smaller size",
                param="size",
            )

    def base_url(self, request: Request) -> str:
        """Return the address of the server for links, without a slash at its end."""
        return self.options.url.rstrip("/") or f"{request.url.scheme}://{request.url.netloc}"

    def image_url(self, request: Request, job: str, index: int, output: Output) -> str:
        """Return the address of an image of a job, which whoever has it can read."""
        query = {"signature": self.signature(job, index)}
        if output.quality != 100:
            query["compression"] = str(output.quality)
        path = f"/v1/jobs/{job}/images/{index}.{output.format}"
        return f"{self.base_url(request)}{path}?{urlencode(query)}"

    def signature(self, job: str, index: int) -> str:
        """Return the signature of the address of an image."""
        return hmac.new(self.secret, f"{job}/{index}".encode(), hashlib.sha256).hexdigest()

    async def file(self, images: ImageRequest, index: int, pixels: Pixels, output: Output) -> bytes:
        """Return a finished image of a request as a file."""
        metadata = image_metadata(images, index) if self.options.metadata else None
        return await asyncio.to_thread(
            encode_image, pixels, output.format, quality=output.quality, metadata=metadata
        )

    async def base64(self, images: ImageRequest, index: int, pixels: Pixels, output: Output) -> str:
        """Return a finished image of a request as a file in base64."""
        return base64.b64encode(await self.file(images, index, pixels, output)).decode()


def _digest(request: Request, fields: msgspec.Struct) -> str:
    """Return the digest of a request's path and body."""
    content = request.scope["path"].encode() + msgspec.json.encode(fields)
    return hashlib.sha256(content).hexdigest()


def owner_of(request: Request) -> str:
    """Return the name of the key that a request came with."""
    owner: str = request.scope.get(OWNER, ANYONE)
    return owner


def complete(
    name: str,
    model: ModelCard,
    prompt: str,
    *,
    pictures: Pictures = Pictures(),
    count: int = 1,
    previews: int = 0,
    names: Mapping[str, str] = NAMES,
    **settings: Any,
) -> ImageRequest:
    """Return a request to a model, complete and checked.

    Args:
        name, model: the model.
        prompt: text of all images.
        pictures: to start from.
        count: number of images.
        previews: previews of each image.
        names: of the client's fields by those of settings, where they differ.
        settings: as for Pipeline.__call__(); None counts as absent.

    Raises:
        BadRequestError: the model cannot do it; it names the field.
    """
    if pictures.depth_map is None and "depth" in model.manifest.conditioning.channels:
        raise BadRequestError(
            f"{name} needs a depth map: send image and depth_map to /v1/jobs", param="depth_map"
        )
    try:
        request = ImageRequest.of(
            name,
            model.manifest,
            prompt,
            count=count,
            image=pictures.image,
            mask=pictures.mask,
            depth_map=pictures.depth_map,
            previews=previews,
            **settings,
        )
        return _fitted(request, model.manifest.shrink)
    except ServeError:
        raise
    except LatentforgeError as error:
        named = _NAMED.search(str(error))
        param = names.get(named[1], named[1]) if named else None
        raise BadRequestError(error, param=param) from error


def _fitted(request: ImageRequest, shrink: int) -> ImageRequest:
    """Return a request with pictures of the size that it works at, as the runtime resizes them.

    So what waits in the queue has the size of the model's images, not that of a client's camera.
    """
    if request.image is None:
        return request
    height, width = request.shared.height // shrink, request.shared.width // shrink
    if request.mask is None:
        return replace(request, image=resized(request.image, height, width))
    image, mask = (resized(p, height, width) for p in (request.image, request.mask))
    return replace(request, image=image, mask=mask)


async def completed(work: Callable[[], ImageRequest], *, pictures: bool) -> ImageRequest:
    """Return the request that complete() makes in some work.

    Args:
        work: the work.
        pictures: True if it decodes pictures, which takes a thread. All else takes less time than
            the way to a thread and back, for which a loaded server has to wait several times.
    """
    return await asyncio.to_thread(work) if pictures else work()


def settings_of(fields: ImageFields) -> dict[str, Any]:
    """Return the runtime's settings for the fields of a request."""
    size = {}
    if fields.size not in (None, "auto"):
        width, height = map(int, str(fields.size).split("x"))
        size = {"height": height, "width": width}
    return {
        **size,
        "negative_prompt": fields.negative_prompt,
        "steps": fields.num_inference_steps,
        "guidance_scale": fields.guidance_scale,
        "guidance_rescale": fields.guidance_rescale,
        "image_guidance_scale": fields.image_guidance_scale,
        "noise_level": fields.noise_level,
        "sampler": fields.sampler,
        "seed": fields.seed,
        "strength": fields.strength,
        "unaccelerated": fields.unaccelerated,
    }
