"""Server-sent events, and answers that end when their client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

__all__ = ["ClientGoneError", "EventStream", "answered", "sse_event"]

T = TypeVar("T")

PING_SECONDS = 10.0
"""Longest silence of a stream: proxies close silent ones, and a ping finds peers that are gone."""

_PING = b": ping\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]


class ClientGoneError(Exception):
    """Client that closed its connection before its answer."""


def sse_event(name: str, data: Any) -> bytes:
    """Return one event whose data is JSON, which has no line ends."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of some work, which is cancelled as soon as the client is gone.

    The body of the request must have been read.

    Raises:
        ClientGoneError: the connection was closed first.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        await _cancelled(task, gone)


async def answered(
    request: Request, work: Coroutine[Any, Any, T], abandoned: Callable[[], object]
) -> T:
    """Return an answer, and call a function if the client is gone before.

    Raises:
        ClientGoneError: it is.
    """
    try:
        return await _while_connected(request.receive, work)
    except ClientGoneError:
        abandoned()
        raise


class EventStream:
    """Answer of events, with pings in silences.

    Args:
        events: encoded events; closed when the stream ends, for whatever reason.
        abandoned: called if the client was gone before the last event.
        ping: seconds of silence after which a ping is sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        abandoned: Callable[[], object] = lambda: None,
        ping: float = PING_SECONDS,
    ) -> None:
        self._events = events
        self._abandoned = abandoned
        self._ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as an ASGI application."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        complete = False
        try:
            await _while_connected(receive, self._send(send))
            complete = True
        except ClientGoneError:
            pass
        finally:
            if not complete:
                self._abandoned()

    async def _send(self, send: Send) -> None:
        waiting: asyncio.Future[bytes] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(self._events))
                await asyncio.wait({waiting}, timeout=self._ping)
                chunk = _PING
                if waiting.done():
                    chunk, waiting = waiting.result(), None
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except StopAsyncIteration:
            await send({"type": "http.response.body", "body": b""})
        finally:
            if waiting is not None:
                await _cancelled(waiting)
            await self._events.aclose()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait for their end, so that they clean up before the answer is over."""
    for task in tasks:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
