"""Jobs: requests whose client asks later, follows their events, or cancels them."""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from latentforge.runtime.record import Record
from latentforge.serve.errors import ForbiddenError, UnknownJobError
from latentforge.serve.http.body import decode, read_json, read_query
from latentforge.serve.http.context import (
    Context,
    Output,
    Pictures,
    complete,
    completed,
    settings_of,
)
from latentforge.serve.http.endpoint import Endpoint, TextRequest
from latentforge.serve.http.envelope import Json
from latentforge.serve.http.fields import (
    JobAnswer,
    JobBody,
    JobFailure,
    JobImage,
    JobProgress,
)
from latentforge.serve.http.openai import (
    REFUSALS,
    error_of,
    require_previews,
    size_of,
    warnings_of,
)
from latentforge.serve.http.sse import EventStream, sse_event
from latentforge.serve.job import (
    Cancelled,
    Completed,
    Failed,
    IgnoredText,
    ImageDone,
    Job,
    JobEvent,
    Queued,
    Started,
    Stepped,
)
from latentforge.serve.pictures import (
    ImageFormat,
    PictureLimits,
    decode_base64,
    encode_preview,
    image_pixels,
    mask_levels,
    open_picture,
)
from latentforge.serve.request import ImageRequest

__all__ = ["JobEndpoints", "decoded_pictures"]

_LOST = (404, 410)
_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_FORMATS: Mapping[str, ImageFormat] = {"png": "png", "jpeg": "jpeg", "webp": "webp"}
_PRIVATE = {"cache-control": "private, max-age=600"}
_FILE = re.compile(r"([0-9]{1,4})\.(png|jpeg|webp)")
_GROUP = "Jobs"


class ImageQuery(Record, frozen=True, kw_only=True):
    """Query of the address of an image."""

    signature: Annotated[str, Meta(max_length=128)]
    compression: Annotated[int, Meta(ge=0, le=100)] | None = None


@dataclass(frozen=True)
class JobEndpoints:
    """Endpoints of jobs."""

    context: Context

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return the endpoints."""
        return (
            Endpoint(
                method="POST", path="/v1/jobs", handler=self.create, group=_GROUP,
                summary="Accept a request for images, and answer at once.",
                body=JobBody, parse=self._parse, answer=JobAnswer, status=202, errors=REFUSALS,
                idempotent=True,
            ),
            Endpoint(
                method="GET", path="/v1/jobs/{id}", handler=self.read, group=_GROUP,
                summary="Return a job as it stands.", answer=JobAnswer, errors=_LOST,
            ),
            Endpoint(
                method="GET", path="/v1/jobs/{id}/events", handler=self.events, group=_GROUP,
                summary="Stream the events of a job: those until now, then as they happen.",
                media_type="text/event-stream", errors=_LOST,
            ),
            Endpoint(
                method="POST", path="/v1/jobs/{id}/cancel", handler=self.cancel, group=_GROUP,
                summary="End a job; one that has ended stays as it is.",
                answer=JobAnswer, errors=_LOST,
            ),
            Endpoint(
                method="GET", path="/v1/jobs/{id}/images/{file}", handler=self.image,
                group=_GROUP, summary="Return a finished image; its address needs no key.",
                query=ImageQuery, media_type="image/*", errors=(400, 403, *_LOST), open=True,
            ),
        )  # fmt: skip

    async def create(self, request: Request) -> ASGIApp:
        """Answer POST /v1/jobs."""
        body = await read_json(request, JobBody, self.context.options.body)
        images = await completed(partial(self._completed, body), pictures=_has_pictures(body))
        job = await self.context.submit(request, images, body, body.timeout)
        answer = self._answer(request, job)
        return Json(answer, 202, {"location": answer.poll_url})

    def _parse(self, content: bytes) -> TextRequest | None:
        body = decode(JobBody, content)
        if _has_pictures(body):
            return None
        return TextRequest(images=self._completed(body), seconds=body.timeout)

    def _completed(self, body: JobBody) -> ImageRequest:
        name, model = self.context.model(body.model)
        require_previews(name, model, body.previews or 0, "previews")
        limits = self.context.options.pictures
        return complete(
            name,
            model,
            body.prompt,
            pictures=decoded_pictures(body.image, body.mask, limits, body.depth_map),
            count=body.n or 1,
            previews=body.previews or 0,
            **settings_of(body),
        )

    async def read(self, request: Request) -> ASGIApp:
        """Answer GET /v1/jobs/{id}."""
        return Json(self._answer(request, self._job(request)))

    async def cancel(self, request: Request) -> ASGIApp:
        """Answer POST /v1/jobs/{id}/cancel."""
        job = self._job(request)
        self.context.service.cancel(job.id)
        return Json(self._answer(request, self._job(request)))

    async def events(self, request: Request) -> ASGIApp:
        """Answer GET /v1/jobs/{id}/events."""
        return EventStream(self._events(request, self._job(request)))

    async def image(self, request: Request) -> ASGIApp:
        """Answer GET /v1/jobs/{id}/images/{file}."""
        query, id = read_query(request, ImageQuery), request.path_params["id"]
        file = _FILE.fullmatch(request.path_params["file"])
        if file is None:
            raise UnknownJobError("an image of a job is a number with .png, .jpeg or .webp")
        index = int(file[1])
        if not hmac.compare_digest(query.signature.encode(), self._signature(id, index)):
            raise ForbiddenError("the address of the image is not complete", param="signature")
        job = self.context.service.get(id)
        if index not in job.images:
            raise UnknownJobError("the job has no such image yet: see its status")
        quality = 100 if query.compression is None else query.compression
        output = Output(format=_FORMATS[file[2]], quality=quality)
        content = await self.context.file(job.request, index, job.images[index], output)
        return Response(content, media_type=_TYPES[file[2]], headers=_PRIVATE)

    def _signature(self, id: str, index: int) -> bytes:
        return self.context.signature(id, index).encode()

    def _job(self, request: Request) -> Job:
        return self.context.job(request.path_params["id"], request)

    async def _events(self, request: Request, job: Job) -> AsyncGenerator[bytes, None]:
        async for event in self.context.service.events(job.id):
            yield await self._event(request, job, event)

    async def _event(self, request: Request, job: Job, event: JobEvent) -> bytes:
        if isinstance(event, Queued):
            return sse_event("queued", {"position": event.position})
        if isinstance(event, Started):
            return sse_event("started", {})
        if isinstance(event, Stepped):
            return sse_event("progress", await asyncio.to_thread(_progress, event))
        if isinstance(event, IgnoredText):
            return sse_event("warning", {"warnings": warnings_of(self.context.service.get(job.id))})
        if isinstance(event, ImageDone):
            return sse_event("image", self._image(request, job, event.index))
        name = {Completed: "completed", Failed: "failed", Cancelled: "cancelled"}[type(event)]
        return sse_event(name, self._answer(request, self.context.service.get(job.id)))

    def _image(self, request: Request, job: Job, index: int) -> JobImage:
        url = self.context.image_url(request, job.id, index, Output())
        return JobImage(index=index, seed=job.request.settings.seeds[index], url=url)

    def _answer(self, request: Request, job: Job) -> JobAnswer:
        here = f"{self.context.base_url(request)}/v1/jobs/{job.id}"
        settings = job.request.settings
        return JobAnswer(
            id=job.id,
            status=job.state.value,
            model=job.request.model,
            queue_position=job.position if job.state.value == "queued" else None,
            progress=JobProgress(
                step=job.step.step if job.step else 0,
                steps=job.step.count if job.step else settings.steps,
                fraction=job.progress,
            ),
            images=tuple(self._image(request, job, index) for index in sorted(job.images)),
            seeds=settings.seeds,
            size=size_of(job.request),
            warnings=warnings_of(job),
            error=_failure(job),
            created=job.created,
            started=job.started,
            ended=job.ended,
            poll_url=here,
            events_url=f"{here}/events",
            cancel_url=f"{here}/cancel",
        )


def decoded_pictures(
    image: str | None, mask: str | None, limits: PictureLimits, depth_map: str | None = None
) -> Pictures:
    """Return the pictures of base64 texts; a mask is light where to paint.

    Raises:
        BadRequestError, PayloadError: one is no picture, or too large.
    """
    found = {"image": image, "mask": mask, "depth_map": depth_map}
    opened = {
        name: open_picture(decode_base64(text, name), name, limits, deep=name == "depth_map")
        for name, text in found.items()
        if text is not None
    }
    return Pictures(
        image=image_pixels(opened["image"]) if "image" in opened else None,
        mask=mask_levels(opened["mask"]) if "mask" in opened else None,
        depth_map=opened.get("depth_map"),
    )


def _has_pictures(body: JobBody) -> bool:
    return any((body.image, body.mask, body.depth_map))


def _progress(event: Stepped) -> dict[str, Any]:
    """Return the data of a step, with its previews as JPEG files in base64."""
    previews = [
        {"index": index, "b64_jpeg": base64.b64encode(encode_preview(pixels)).decode()}
        for index, pixels in sorted(event.previews.items())
    ]
    return {
        "step": event.step,
        "steps": event.count,
        "fraction": event.progress,
        "images": event.images,
        "previews": previews,
    }


def _failure(job: Job) -> JobFailure | None:
    if isinstance(job.end, Failed | Cancelled):
        error = error_of(job.end)
        return JobFailure(code=error.code, message=str(error))
    return None
