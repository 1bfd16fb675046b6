"""Shared images, as pages and files for whoever has the link."""

import html
import time
from dataclasses import dataclass

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from latentforge.serve.http.page import SECURITY_HEADERS, page_template
from latentforge.serve.share import SharedImage, ShareStore

__all__ = ["SharePages"]

_HEADERS = {**SECURITY_HEADERS, "Cache-Control": "no-store", "X-Robots-Tag": "noindex, nofollow"}


@dataclass(frozen=True)
class SharePages:
    """Pages and files of shared images."""

    shares: ShareStore

    def routes(self) -> list[Route]:
        """Return their routes, which take no key: the name in the address is one."""
        return [Route("/s/{id}.png", self.picture), Route("/s/{id}", self.page)]

    async def page(self, request: Request) -> Response:
        """Return the page of a shared image, with its prompt."""
        image = await self._find(request)
        if image is None:
            return _document("gone.html", 404, {})
        return _document("share.html", 200, _values(request, image))

    async def picture(self, request: Request) -> Response:
        """Return the PNG file of a shared image."""
        image = await self._find(request)
        content = None if image is None else await run_in_threadpool(self.shares.content, image)
        if image is None or content is None:
            return Response("expired or never shared\n", 404, _HEADERS, "text/plain")
        left = max(0, int(image.expires - time.time()))
        kept = {"Cache-Control": f"private, max-age={left}, immutable"}
        return Response(content, 200, {**_HEADERS, **kept}, "image/png")

    async def _find(self, request: Request) -> SharedImage | None:
        return await run_in_threadpool(self.shares.get, request.path_params["id"], time.time())


def _values(request: Request, image: SharedImage) -> dict[str, str]:
    caption = image.caption
    values = {
        "base": str(request.base_url),
        "created": _date(image.created),
        "expires": _date(image.expires),
        "id": image.id,
        **{name: str(value) for name, value in msgspec.to_builtins(caption).items()},
    }
    return {name: html.escape(value) for name, value in values.items()}


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _document(template: str, status: int, values: dict[str, str]) -> Response:
    content = page_template(template).substitute(values)
    return Response(content, status, _HEADERS, "text/html")
