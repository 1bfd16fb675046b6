"""RequestMiddleware that every request passes: its id, its key, its log line and its metrics."""

from __future__ import annotations

import base64
import binascii
import functools
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import Gauge
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentforge.serve.errors import BusyError, ForbiddenError, KeyRequiredError, ServeError
from latentforge.serve.http.context import JOB, MODEL, OWNER, TEXT
from latentforge.serve.http.endpoint import Handler
from latentforge.serve.http.envelope import error_response
from latentforge.serve.http.sse import ClientGoneError
from latentforge.serve.logs import RequestLog
from latentforge.serve.metrics import Metrics
from latentforge.serve.tracing import describe_span, request_span, trace_id

__all__ = ["CONNECTIONS", "Authenticate", "RequestMiddleware", "first_values", "guarded", "key_of"]

REQUEST_ID = "latentforge.request_id"
CONNECTIONS = "latentforge.connections"
"""Entry of a request's scope: the number of open connections."""

Authenticate = Callable[[str | None], str]
"""Function that returns the owner of a key, or raises KeyRequiredError."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_PORT = re.compile(r":[0-9]+$")
_GONE = 499
_DEFAULTS = {b"x-content-type-options": b"nosniff", b"cache-control": b"no-store"}
"""Headers of answers that have no other."""


def guarded(handler: Handler, authenticate: Authenticate) -> Handler:
    """Return a handler that needs a key, if the server has any."""

    @functools.wraps(handler)
    async def checked(request: Request) -> ASGIApp:
        request.scope[OWNER] = authenticate(key_of(request.headers))
        return await handler(request)

    return checked


def key_of(headers: Mapping[str, str]) -> str | None:
    """Return the key of a request: a bearer token, or the password of a client that knows none.

    Raises:
        KeyRequiredError: it cannot be read.
    """
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
        hosts: names of the server that requests may have; None for any.
        connections: most that may be open. Uvicorn's own limit answers by itself, without an
            error's envelope and the time to try again.
        vital: paths that are answered also where more are.
    """

    app: ASGIApp
    metrics: Metrics
    log: RequestLog = RequestLog()
    hosts: frozenset[str] | None = None
    connections: int = 1 << 16
    vital: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request as an ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = first_values(scope)
        scope[REQUEST_ID] = _request_id(headers)
        answer = _Answer(scope, send, self.metrics.open_streams)
        start = time.perf_counter()
        try:
            with request_span(scope["method"], headers) as span:
                try:
                    await self._guarded(scope, headers)(scope, receive, answer.send)
                finally:
                    describe_span(span, scope["method"], _route(scope), answer.status)
        except ClientGoneError:
            answer.status = _GONE
        finally:
            answer.close()
            self._record(scope, headers, answer.status, time.perf_counter() - start)

    def admits(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        """Return True if a request reaches the endpoints, and is not refused before."""
        return self._guarded(scope, headers) is self.app

    def refuse(
        self, scope: Scope, headers: Mapping[str, str], error: ServeError, seconds: float
    ) -> Response:
        """Return the answer to a request that was refused before its ASGI cycle, and record it.

        Args:
            scope: of the request, with the entries that endpoints add.
            headers: its headers, as first_values() returns them.
            error: the reason.
            seconds: that it took.
        """
        scope[REQUEST_ID] = _request_id(headers)
        answer = error_response(error)
        answer.raw_headers = _with_ids(scope, answer.raw_headers)
        with request_span(scope["method"], headers) as span:
            describe_span(span, scope["method"], _route(scope), answer.status_code)
        self._record(scope, headers, answer.status_code, seconds)
        return answer

    def _guarded(self, scope: Scope, headers: Mapping[str, str]) -> ASGIApp:
        """Return the application, or the refusal of a request.

        There are too many connections, or another site's page makes the request.
        """
        if scope.get(CONNECTIONS, 0) > self.connections and scope["path"] not in self.vital:
            return _crowded()
        if self.hosts is None:
            return self.app
        if _PORT.sub("", headers.get("host", "")).strip("[]") not in self.hosts:
            refusal = ForbiddenError("this server answers to its own name alone", param="Host")
            return error_response(refusal)
        if scope["method"] == "POST" and headers.get("sec-fetch-site") == "cross-site":
            return error_response(ForbiddenError("pages of other sites may not post here"))
        return self.app

    def _record(
        self, scope: Scope, headers: Mapping[str, str], status: int, seconds: float
    ) -> None:
        route = _route(scope)
        model = scope.get(MODEL, "")
        self.metrics.count_request(route, model, status, seconds)
        fields = {
            "method": scope["method"],
            "seconds": round(seconds, 4),
            "id": scope[REQUEST_ID],
            "trace": trace_id(headers),
            "model": model or None,
            "job": scope.get(JOB),
            "owner": scope.get(OWNER),
            "prompt": scope.get(TEXT),
        }
        self.log.write(fields, route=route, status=status)


def _crowded() -> ASGIApp:
    """Return the refusal of a request on one connection too many, which it ends."""
    refusal = BusyError("too many connections are open: try again", retry_after=5.0)
    answer = error_response(refusal)
    answer.headers["connection"] = "close"
    return answer


@dataclass
class _Answer:
    """Answer that is being sent.

    Attributes:
        scope: of the request.
        forward: sends a message to the client.
        streams: number of streams of events that are being sent.
        status: of the answer; 500 until it begins.
        streaming: True if it is one of these.
    """

    scope: Scope
    forward: Send
    streams: Gauge
    status: int = 500
    streaming: bool = False

    async def send(self, message: Message) -> None:
        """Send a message, with the ids of the request and its job in the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kind = dict(message["headers"]).get(b"content-type", b"")
            if kind.startswith(b"text/event-stream"):
                self.streaming = True
                self.streams.inc()
            message = {**message, "headers": _with_ids(self.scope, message["headers"])}
        await self.forward(message)

    def close(self) -> None:
        """End the answer."""
        if self.streaming:
            self.streams.dec()


def _with_ids(scope: Scope, given: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer, with the ids of the request and its job."""
    headers = [*given, (b"x-request-id", scope[REQUEST_ID].encode())]
    names = {name for name, _ in headers}
    headers += [item for item in _DEFAULTS.items() if item[0] not in names]
    if JOB in scope:
        headers.append((b"x-job-id", scope[JOB].encode()))
    return headers


def _route(scope: Scope) -> str:
    """Return the path of the endpoint that answered, with its parameters in braces."""
    route: str = getattr(scope.get("route"), "path", "none")
    return route


def first_values(scope: Scope) -> Mapping[str, str]:
    """Return the headers of a request, each with its first value."""
    pairs = reversed(scope["headers"])
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in pairs}


def _request_id(headers: Mapping[str, str]) -> str:
    """Return the id that the client chose, if it can stand in a log, or a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
