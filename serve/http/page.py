"""Page at ``/``, and the files that it consists of."""

import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["SECURITY_HEADERS", "page_routes", "page_template", "page_text"]

_FOLDER = Path(__file__).resolve().parents[1] / "page"

_POLICY = {
    "default-src": "'self'",
    "img-src": "'self' blob:",  # images from the API, which need a key
    "object-src": "'none'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "; ".join(" ".join(item) for item in _POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of all that a browser shows: nothing is loaded from elsewhere, and nothing is guessed."""


_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Types that do not depend on what the machine's registry says."""


@dataclass(frozen=True)
class PageFile:
    """File of the page, held in memory. A browser keeps it, and asks whether it has changed."""

    content: bytes
    headers: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "PageFile":
        """Return a file of the folder."""
        kind = _TYPES.get(path.suffix) or mimetypes.types_map[path.suffix]
        return cls.of(path.read_bytes(), kind)

    @classmethod
    def of(cls, content: bytes, kind: str) -> "PageFile":
        """Return a file of this content and type."""
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        caching = {"Cache-Control": "no-cache", "Content-Type": kind, "ETag": etag}
        return cls(content, {**SECURITY_HEADERS, **caching})

    async def respond(self, request: Request) -> Response:
        """Return the file, or 304 to a browser that has it."""
        kept = request.headers.get("if-none-match", "").split(",")
        if self.headers["ETag"] in (tag.strip().removeprefix("W/") for tag in kept):
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers)


def page_routes() -> list[Route]:
    """Return the routes of the page: ``/``, and ``/page/NAME`` of each file that it loads."""
    files = {path.name: path for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}
    loaded = [name for name in files if not name.endswith(".html")]
    routes = [Route(f"/page/{name}", PageFile.read(files[name]).respond) for name in loaded]
    index = page_text("index.html", root="").encode()
    return [Route("/", PageFile.of(index, _TYPES[".html"]).respond), *routes]


def page_text(name: str, *, root: str, **values: str) -> str:
    """Return a whole page of the page's folder, with the head and the mark that all have.

    Args:
        name: of the file.
        root: leads from the page to the root of the server.
        values: of the page, escaped.
    """
    common = page_template("head.html").substitute(root=root)
    mark = page_template("mark.html").substitute().strip()
    return page_template(name).substitute(common=common, mark=mark, **values)


def page_template(name: str) -> Template:
    """Return a template of the page's folder. Its values must be escaped."""
    return Template((_FOLDER / name).read_text("utf-8"))
