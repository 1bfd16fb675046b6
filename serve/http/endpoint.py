"""Endpoints: the table that routes and the OpenAPI description are made from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from latentforge.serve.request import ImageRequest

__all__ = ["Endpoint", "Handler", "TextRequest"]

Handler: TypeAlias = Callable[[Request], Awaitable[ASGIApp]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRequest:
    """Request for images of text alone, as a body has it.

    Attributes:
        images: the images, complete and checked.
        seconds: until the deadline; None for the server's own.
    """

    images: ImageRequest
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One method of one path.

    Attributes:
        method: GET or POST.
        path: with parameters in braces.
        handler: answers a request.
        summary: one sentence.
        group: heading under which it is described.
        body: record of the JSON body, or of the form.
        form: True if the body is a multipart form.
        parse: reads a body that asks for images, or raises a ServeError; None for one with
            pictures, which take a thread to decode. None if the endpoint has no such bodies.
        query: record of the query's parameters.
        answer: type of the answer in JSON; None for other answers.
        refusal: record of an answer of status 503 that is no error.
        media_type: of the answer.
        status: of the answer.
        errors: statuses of errors, beside 401 and 500.
        streams: True if the answer may be a stream of events.
        idempotent: True if it takes an Idempotency-Key.
        open: True if it needs no key.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    group: str
    body: type[msgspec.Struct] | None = None
    form: bool = False
    parse: Callable[[bytes], TextRequest | None] | None = None
    query: type[msgspec.Struct] | None = None
    answer: Any = None
    refusal: type[msgspec.Struct] | None = None
    media_type: str = "application/json"
    status: int = 200
    errors: tuple[int, ...] = ()
    streams: bool = False
    idempotent: bool = False
    open: bool = False
