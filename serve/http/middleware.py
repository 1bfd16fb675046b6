"""RequestMiddleware that every request passes: its id, its key, its log line and its metrics."""

from __future__ import annotations

import base64
import binascii
import functools
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentforge.serve.errors import KeyRequiredError
from latentforge.serve.http.context import JOB, MODEL, OWNER
from latentforge.serve.http.endpoint import Handler
from latentforge.serve.http.sse import ClientGoneError
from latentforge.serve.logs import RequestLog
from latentforge.serve.metrics import Metrics
from latentforge.serve.tracing import request_span, trace_id

__all__ = ["Authenticate", "RequestMiddleware", "guarded"]

Authenticate = Callable[[str | None], str]
"""Function that returns the owner of a key, or raises KeyRequiredError."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_GONE = 499


def guarded(handler: Handler, authenticate: Authenticate) -> Handler:
    """Return a handler that needs a key, if the server has any."""

    @functools.wraps(handler)
    async def checked(request: Request) -> ASGIApp:
        request.scope[OWNER] = authenticate(_key(request.headers))
        return await handler(request)

    return checked


def _key(headers: Headers) -> str | None:
    """Return the key of a request: a bearer token, or the password of a client that knows none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError) as error:
        raise KeyRequiredError("the Authorization header cannot be read") from error


@dataclass(frozen=True)
class RequestMiddleware:
    """Application around the endpoints.

    Attributes:
        app: the endpoints.
        metrics: of the server.
        log: of requests.
    """

    app: ASGIApp
    metrics: Metrics
    log: RequestLog = RequestLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as an ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = _Answer(send, _request_id(headers))
        scope["latentforge.request_id"] = answer.request_id
        start = time.perf_counter()
        try:
            with request_span(scope["method"], headers):
                await self.app(scope, receive, answer.send)
        except ClientGoneError:
            answer.status = _GONE
        finally:
            self._record(scope, headers, answer, time.perf_counter() - start)

    def _record(self, scope: Scope, headers: Headers, answer: _Answer, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        model = scope.get(MODEL, "")
        status = answer.status
        self.metrics.requests.labels(route=route, model=model, status=str(status)).inc()
        self.metrics.request_seconds.labels(route=route).observe(seconds)
        fields = {
            "method": scope["method"],
            "seconds": round(seconds, 4),
            "id": answer.request_id,
            "trace": trace_id(headers),
            "model": model or None,
            "job": scope.get(JOB),
            "owner": scope.get(OWNER),
        }
        self.log.write(fields, route=route, status=status)


@dataclass
class _Answer:
    """Answer that is being sent.

    Attributes:
        forward: sends a message to the client.
        request_id: of the request.
        status: of the answer; 500 until it begins.
    """

    forward: Send
    request_id: str
    status: int = 500

    async def send(self, message: Message) -> None:
        """Send a message, with the request's id in the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers.setdefault("x-content-type-options", "nosniff")
            headers.setdefault("cache-control", "no-store")
        await self.forward(message)


def _request_id(headers: Headers) -> str:
    """Return the id that the client chose, if it can stand in a log, or a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
