"""OpenAI's API: images of a text, edits of an image, and models."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from latentforge.serve.errors import (
    BadRequestError,
    DrainingError,
    JobCancelledError,
    ServeError,
    job_error,
)
from latentforge.serve.http.body import decode, read_form, read_json
from latentforge.serve.http.context import (
    Context,
    Output,
    Pictures,
    complete,
    completed,
    settings_of,
)
from latentforge.serve.http.endpoint import Endpoint, TextRequest
from latentforge.serve.http.envelope import Json, envelope
from latentforge.serve.http.fields import (
    EditForm,
    GenerationBody,
    IgnoredPart,
    ImageAnswer,
    ImageListAnswer,
    ModelAnswer,
    ModelListAnswer,
    OpenAIFields,
    OutputFields,
)
from latentforge.serve.http.sse import EventStream, answered, sse_event
from latentforge.serve.job import Cancelled, Failed, IgnoredText, ImageDone, Job, Stepped
from latentforge.serve.pictures import (
    PictureLimits,
    Pixels,
    encode_image,
    has_holes,
    image_pixels,
    open_picture,
    transparent_mask,
)
from latentforge.serve.request import ImageRequest
from latentforge.serve.service import ModelCard

__all__ = [
    "REFUSALS",
    "OpenAIEndpoints",
    "error_of",
    "finished",
    "makes_previews",
    "output_of",
    "require_previews",
    "size_of",
    "warnings_of",
]

REFUSALS = (400, 404, 408, 409, 410, 413, 415, 422, 429, 503, 504)
"""Statuses of requests for images that are not fulfilled."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Accepted request for images, and how to answer it.

    Attributes:
        context: of the server.
        request: the client's.
        job: the job that it became.
        fields: body of the request.
        event: first part of the names of its events.
    """

    context: Context
    request: Request
    job: Job
    fields: OpenAIFields
    event: str

    @property
    def output(self) -> Output:
        """File format of the images."""
        return output_of(self.fields)

    @property
    def kept(self) -> bool:
        """True if the job goes on without its client, which asks again with the same key."""
        return "idempotency-key" in self.request.headers

    def abandon(self) -> None:
        """End the job, whose client is gone."""
        if not self.kept:
            self.context.service.cancel(self.job.id)

    async def answer(self) -> Response:
        """Return the answer once all images are done."""
        job = await finished(self.context, self.job.id)
        data = [await self._image(job, index) for index in sorted(job.images)]
        return Json(
            ImageListAnswer(
                created=int(job.created),
                data=tuple(data),
                output_format=self.output.format,
                size=size_of(job.request),
                warnings=warnings_of(job),
            )
        )

    async def _image(self, job: Job, index: int) -> ImageAnswer:
        seed = job.request.settings.seeds[index]
        if self.fields.response_format == "url":
            url = self.context.image_url(self.request, job.id, index, self.output)
            return ImageAnswer(url=url, seed=seed)
        pixels = job.images[index]
        text = await self.context.base64(job.request, index, pixels, self.output)
        return ImageAnswer(b64_json=text, seed=seed)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of the request: partial images, and images."""
        partials: dict[int, int] = {}
        async for event in self.context.service.events(self.job.id):
            if isinstance(event, Stepped):
                for index, pixels in event.previews.items():
                    number = partials.get(index, 0)
                    partials[index] = number + 1
                    if number < (self.fields.partial_images or 0):
                        yield await self._partial(index, number, pixels)
            elif isinstance(event, ImageDone):
                yield await self._completed(event)
            elif isinstance(event, Failed | Cancelled):
                error = error_of(event, draining=self.context.service.draining)
                yield sse_event("error", envelope(error))

    async def _partial(self, index: int, number: int, pixels: Pixels) -> bytes:
        whole = enlarged(pixels, self.job.request)
        data = await asyncio.to_thread(
            encode_image, whole, self.output.format, quality=self.output.quality
        )
        return self._event(
            "partial_image",
            b64_json=base64.b64encode(data).decode(),
            partial_image_index=number,
            image_index=index,
        )

    async def _completed(self, done: ImageDone) -> bytes:
        images, index = self.job.request, done.index
        return self._event(
            "completed",
            b64_json=await self.context.base64(images, index, done.pixels, self.output),
            image_index=index,
            seed=images.settings.seeds[index],
            warnings=warnings_of(self.context.service.get(self.job.id)),
            usage=None,
        )

    def _event(self, name: str, **data: Any) -> bytes:
        name = f"{self.event}.{name}"
        common = {
            "type": name,
            "created_at": int(time.time()),
            "size": size_of(self.job.request),
            "quality": "auto",
            "background": "opaque",
            "output_format": self.output.format,
        }
        return sse_event(name, {**common, **data})


@dataclass(frozen=True)
class OpenAIEndpoints:
    """Endpoints of OpenAI's API."""

    context: Context

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return the endpoints."""
        images: dict[str, Any] = {
            "method": "POST", "group": "OpenAI", "answer": ImageListAnswer,
            "errors": REFUSALS, "streams": True, "idempotent": True,
        }  # fmt: skip
        models: dict[str, Any] = {"method": "GET", "group": "OpenAI"}
        return (
            Endpoint(
                path="/v1/images/generations",
                handler=self.generate,
                summary="Generate images of a text.",
                body=GenerationBody,
                parse=self._parse,
                **images,
            ),
            Endpoint(
                path="/v1/images/edits",
                handler=self.edit,
                summary="Change an image, or the transparent part of it.",
                body=EditForm,
                form=True,
                **images,
            ),
            Endpoint(
                path="/v1/models",
                handler=self.models,
                summary="List the models.",
                answer=ModelListAnswer,
                **models,
            ),
            Endpoint(
                path="/v1/models/{model}",
                handler=self.model,
                summary="Describe a model.",
                answer=ModelAnswer,
                errors=(404,),
                **models,
            ),
        )

    async def generate(self, request: Request) -> ASGIApp:
        """Answer POST /v1/images/generations."""
        body = await read_json(request, GenerationBody, self.context.options.body)
        return await self._images(request, body, Pictures, "image_generation")

    async def edit(self, request: Request) -> ASGIApp:
        """Answer POST /v1/images/edits."""
        form = await read_form(request, self.context.options.body)
        if isinstance(form.get("image[]", form.get("image")), list):
            raise BadRequestError("image must be one picture: send one", param="image")
        if "image[]" in form and "image" not in form:
            form["image"] = form.pop("image[]")
        body = decode(EditForm, form)
        pictures = partial(_edited, body, self.context.options.pictures)
        return await self._images(request, body, pictures, "image_edit")

    async def _images(
        self,
        request: Request,
        body: OpenAIFields,
        pictures: Callable[[], Pictures],
        event: str,
    ) -> ASGIApp:
        work = partial(self._completed, body, pictures)
        images = await completed(work, pictures=isinstance(body, EditForm))
        job = await self.context.submit(request, images, body, body.timeout)
        run = _Run(context=self.context, request=request, job=job, fields=body, event=event)
        if body.stream:
            return EventStream(run.stream(), abandoned=run.abandon)
        return await answered(request, run.answer(), run.abandon)

    def _parse(self, content: bytes) -> TextRequest:
        body = decode(GenerationBody, content)
        return TextRequest(images=self._completed(body, Pictures), seconds=body.timeout)

    def _completed(self, body: OpenAIFields, pictures: Callable[[], Pictures]) -> ImageRequest:
        _check(body)
        name, model = self.context.model(body.model)
        previews = body.partial_images or 0
        require_previews(name, model, previews, "partial_images")
        return complete(
            name,
            model,
            body.prompt,
            pictures=pictures(),
            count=body.n or 1,
            previews=previews,
            **settings_of(body),
        )

    async def models(self, request: Request) -> ASGIApp:
        """Answer GET /v1/models."""
        names = self.context.service.models
        return Json(ModelListAnswer(data=tuple(map(self._model, names))))

    async def model(self, request: Request) -> ASGIApp:
        """Answer GET /v1/models/{model}."""
        name, _ = self.context.model(request.path_params["model"])
        return Json(self._model(name))

    def _model(self, name: str) -> ModelAnswer:
        _, model = self.context.model(name)
        return ModelAnswer(id=name, created=0, owned_by=model.manifest.family)


async def finished(context: Context, id: str) -> Job:
    """Return a job that has all its images, once it has.

    Raises:
        ServeError: it failed or was cancelled.
    """
    async for event in context.service.events(id):
        if isinstance(event, Failed | Cancelled):
            raise error_of(event, draining=context.service.draining)
    return context.service.get(id)


def error_of(event: Failed | Cancelled, *, draining: bool = False) -> ServeError:
    """Return the error of a job that ended so, perhaps in the end of the server."""
    if isinstance(event, Failed):
        return job_error(event.code, event.message)
    if draining:
        return DrainingError(f"the request was not done in time: {event.reason}", retry_after=5.0)
    return JobCancelledError(f"the job was cancelled: {event.reason}")


def output_of(fields: OutputFields) -> Output:
    """Return the file format that a request wants.

    Raises:
        BadRequestError: PNG files would be compressed with loss.
    """
    format = fields.output_format or "png"
    quality = 100 if fields.output_compression is None else fields.output_compression
    if format == "png" and quality != 100:
        raise BadRequestError(
            "output_compression applies to jpeg and webp: set output_format, or omit it",
            param="output_compression",
        )
    return Output(format=format, quality=quality)


def require_previews(name: str, model: ModelCard, previews: int, param: str) -> None:
    """Check that a model can make previews, if any are wanted.

    Raises:
        BadRequestError: its engines cannot.
    """
    if previews and not makes_previews(model):
        raise BadRequestError(
            f"the engines of {name} make no previews: omit {param}, or export them again",
            param=param,
        )


def makes_previews(model: ModelCard) -> bool:
    """Return True if the engines of a model have a linear map from latents to colours."""
    return model.manifest.preview is not None


def size_of(request: ImageRequest) -> str:
    """Return the size of a request's images as OpenAI writes it."""
    return f"{request.settings.width}x{request.settings.height}"


def warnings_of(job: Job) -> tuple[IgnoredPart, ...]:
    """Return the warnings about a job's prompts, of which a part had no effect."""
    ignored = job.ignored or IgnoredText("", "")
    ends = {"prompt": ignored.prompt, "negative_prompt": ignored.negative}
    return tuple(
        IgnoredPart(param=name, message=f"too long for the model, which did not read: {end!r}")
        for name, end in ends.items()
        if end
    )


def enlarged(pixels: Pixels, request: ImageRequest) -> Pixels:
    """Return a preview in the size of the image."""
    size = (request.settings.width, request.settings.height)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _check(body: OpenAIFields) -> None:
    """Check fields against each other.

    Raises:
        BadRequestError: one has no effect.
    """
    output_of(body)
    if body.partial_images and not body.stream:
        raise BadRequestError("partial_images needs stream: true", param="partial_images")
    if body.stream and body.response_format == "url":
        raise BadRequestError(
            "a stream holds the images: use response_format b64_json", param="response_format"
        )


def _edited(form: EditForm, limits: PictureLimits) -> Pictures:
    """Return the pictures of a form; transparent parts are painted.

    Raises:
        BadRequestError, PayloadError: one is no picture, or too large.
    """
    picture = open_picture(form.image, "image", limits)
    if form.mask is not None:
        marked = open_picture(form.mask, "mask", limits)
        return Pictures(image=image_pixels(picture), mask=transparent_mask(marked, "mask"))
    mask = transparent_mask(picture, "image") if has_holes(picture) else None
    return Pictures(image=image_pixels(picture), mask=mask)
