"""Shared images: the endpoint that shares one, and pages and files for whoever has the link."""

from __future__ import annotations

import asyncio
import html
import time
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from latentforge.runtime.errors import TargetError
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.record import Record
from latentforge.serve.errors import ConflictError, ForbiddenError
from latentforge.serve.http.body import read_json
from latentforge.serve.http.context import Context, Output
from latentforge.serve.http.endpoint import Endpoint
from latentforge.serve.http.envelope import Json
from latentforge.serve.http.page import SECURITY_HEADERS, page_template, page_text
from latentforge.serve.job import Job
from latentforge.serve.share import Caption, SharedImage, ShareFullError, ShareStore

__all__ = ["ShareEndpoints"]

_log = escaping_logger("latentforge.serve")

_HEADERS = {**SECURITY_HEADERS, "Cache-Control": "no-store", "X-Robots-Tag": "noindex, nofollow"}


class ShareBody(Record, frozen=True, kw_only=True):
    """Body of POST /v1/shares: an image that the server generated, and still has.

    Attributes:
        job: id of its job.
        index: number of the image in the job.
    """

    job: Annotated[str, Meta(max_length=128)]
    index: Annotated[int, Meta(ge=0, le=1000)] = 0


class ShareAnswer(Record, frozen=True, kw_only=True):
    """Link to a shared image: its page, and its file.

    Attributes:
        expires: seconds since the epoch.
    """

    id: str
    url: str
    image_url: str
    expires: float


@dataclass(frozen=True)
class ShareEndpoints:
    """Endpoint that shares an image, and what the links lead to."""

    context: Context

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return the endpoint."""
        return (
            Endpoint(
                method="POST", path="/v1/shares", handler=self.create, group="Sharing",
                summary="Share a finished image by a link that needs no key, until it expires.",
                body=ShareBody, answer=ShareAnswer, status=201,
                errors=(400, 403, 404, 408, 409, 410, 413, 415, 503),
            ),
        )  # fmt: skip

    def routes(self) -> list[Route]:
        """Return the routes of links, which take no key: the name in the address is one."""
        return [Route("/s/{id}.png", self.picture), Route("/s/{id}", self.page)]

    async def create(self, request: Request) -> ASGIApp:
        """Answer POST /v1/shares."""
        body = await read_json(request, ShareBody, self.context.options.body)
        shares = self._store()
        job = self.context.job(body.job, request)
        if body.index not in job.images:
            raise ConflictError("the job has no such image: see its status", param="index")
        pixels = job.images[body.index]
        png = await self.context.file(job.request, body.index, pixels, Output())
        try:
            image = await asyncio.to_thread(shares.add, png, _caption(job, body.index), time.time())
        except (OSError, TargetError) as error:
            _log.error("a shared image cannot be written: %s", error)
            raise ShareFullError("the server has no place for it: download the image") from error
        answer = self._answer(request, image)
        return Json(answer, 201, {"location": answer.url})

    async def page(self, request: Request) -> Response:
        """Return the page of a shared image, with its prompt."""
        image = await self._find(request)
        if image is None:
            return _document("gone.html", 404, {})
        return _document("share.html", 200, _values(self._answer(request, image), image))

    async def picture(self, request: Request) -> Response:
        """Return the PNG file of a shared image."""
        image = await self._find(request)
        content = None if image is None else await asyncio.to_thread(self._store().content, image)
        if image is None or content is None:
            return Response("expired, or never shared\n", 404, _HEADERS, "text/plain")
        left = max(0, int(image.expires - time.time()))
        kept = {"Cache-Control": f"private, max-age={left}, immutable"}
        return Response(content, 200, {**_HEADERS, **kept}, "image/png")

    def _store(self) -> ShareStore:
        if self.context.shares is None:
            raise ForbiddenError("this server shares no images: download the image instead")
        return self.context.shares

    async def _find(self, request: Request) -> SharedImage | None:
        if self.context.shares is None:
            return None
        name = request.path_params["id"]
        return await asyncio.to_thread(self.context.shares.get, name, time.time())

    def _answer(self, request: Request, image: SharedImage) -> ShareAnswer:
        url = f"{self.context.base_url(request)}/s/{image.id}"
        return ShareAnswer(
            id=image.id, url=url, image_url=f"{url}.png", expires=float(int(image.expires))
        )


def _caption(job: Job, index: int) -> Caption:
    settings = job.request.settings
    return Caption(
        prompt=settings.prompts[index],
        model=job.request.model,
        seed=settings.seeds[index],
        width=settings.width,
        height=settings.height,
    )


def _values(answer: ShareAnswer, image: SharedImage) -> dict[str, str]:
    values = {
        "created": _date(image.created),
        "expires": _date(image.expires),
        "id": image.id,
        "image_url": answer.image_url,
        **msgspec.to_builtins(image.caption),
    }
    return {name: html.escape(str(value)) for name, value in values.items()}


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _document(name: str, status: int, values: dict[str, str]) -> Response:
    """Return a page in the frame of all that show shared images: <main>, and what is before it."""
    head, start, rest = page_template(name).substitute(values).partition("<main")
    content = page_text("frame.html", root="../", head=head, main=start + rest)
    return Response(content, status, _HEADERS, "text/html")
