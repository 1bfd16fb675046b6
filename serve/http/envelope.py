"""Answers in JSON, and errors in OpenAI's envelope."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from latentforge.runtime.errors import LatentforgeError
from latentforge.runtime.record import Record
from latentforge.serve.errors import ServeError

__all__ = [
    "ErrorDetail",
    "ErrorEnvelope",
    "Json",
    "answer_of",
    "envelope",
    "error_response",
    "handlers",
]

_log = logging.getLogger("latentforge.serve")

CLOSES = frozenset({408, 413})
"""Statuses after which a connection is closed: the rest of the request is not read."""


class ErrorDetail(Record, frozen=True, kw_only=True):
    """Error of a request.

    Attributes:
        message: one line: what is wrong, and what to do next.
        type: kind of error, such as invalid_request_error.
        param: field that is wrong.
        code: name of the error for programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Record, frozen=True, kw_only=True):
    """Body of every answer that is an error."""

    error: ErrorDetail


class Json(Response):
    """Answer of a record as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return msgspec.json.encode(content)


def envelope(error: ServeError) -> ErrorEnvelope:
    """Return the body for an error."""
    detail = ErrorDetail(message=str(error), type=error.kind, param=error.param, code=error.code)
    return ErrorEnvelope(error=detail)


def error_response(error: ServeError) -> Response:
    """Return the answer for an error."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status in CLOSES or error.code == "draining":
        headers["connection"] = "close"
    if error.status == 401:
        headers["www-authenticate"] = 'Bearer realm="latentforge"'
    return Json(envelope(error), error.status, headers)


async def _serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer a path that does not exist, or one with another method."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    messages = {
        404: f"there is nothing at {request.url.path}: /openapi.json lists what there is",
        405: f"{request.method} is not possible here: /openapi.json lists the methods",
    }
    detail = ErrorDetail(
        message=messages.get(error.status_code, error.detail),
        type="invalid_request_error",
        param=None,
        code=codes.get(error.status_code),
    )
    return Json(ErrorEnvelope(error=detail), error.status_code, dict(error.headers or {}))


async def _unexpected(request: Request, error: Exception) -> Response:
    """Answer an error of the server itself, and log it without what the client sent."""
    known = isinstance(error, LatentforgeError)
    _log.error("error while answering %s", request.scope["path"], exc_info=error)
    message = str(error) if known else "an error of the server, which its log explains"
    return error_response(ServeError(message))


async def answer_of(request: Request, error: Exception) -> Response:
    """Return the answer for any error of an endpoint."""
    if isinstance(error, ServeError):
        return error_response(error)
    return await _unexpected(request, error)


def handlers() -> Mapping[Any, Any]:
    """Return Starlette's exception handlers."""
    return {
        ServeError: _serve_error,
        HTTPException: _http_error,
        LatentforgeError: _unexpected,
        Exception: _unexpected,
    }
