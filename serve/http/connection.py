"""HTTP connections that do not wait for ever for clients who send or read too slowly."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any, cast

import httptools
import msgspec
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from latentforge.serve.errors import BadRequestError
from latentforge.serve.http.envelope import envelope
from latentforge.serve.http.middleware import CONNECTIONS
from latentforge.serve.http.refusal import RefusingApp

__all__ = ["BoundedConnection", "find_lost_peers"]

_LARGE = 1 << 16  # bytes that are sent at once
_HEAD_BYTES = 1 << 16  # of headers that are not complete

_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
"""Options by which the kernel finds out that the other machine is gone."""


class _Joined:
    """Transport that sends what is written in one turn of the event loop in one piece.

    Uvicorn writes the head of an answer and its body one after the other. Each would be a packet,
    and wake the client: for a short answer that is a large part of the work.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if data and not self._pieces:
            self._loop.call_soon(self._flush)
        if data:
            self._pieces.append(data)
            self._size += len(data)
        if self._size > _LARGE:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        pieces, self._pieces, self._size = self._pieces, [], 0
        if pieces:
            self._transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))


class BoundedConnection(HttpToolsProtocol):
    """Connection that is closed if a request's headers, or the reading of an answer, take long.

    Requests are parsed by llhttp, in a quarter of the time that a parser in Python takes: a server
    with ten times its load does little else. For the same reason a request that the application
    may refuse is held until the piece of data ends in which its headers came. If all of it is
    there, the application can answer without a cycle; otherwise the cycle begins then.

    Attributes:
        head_seconds: time from the first byte of a request, or from the connection, to the end of
            its headers.
        read_seconds: time in which a client must read some ten kilobytes of an answer that waits.
    """

    head_seconds = 10.0
    read_seconds = 60.0
    _head: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0
    _stalled: asyncio.TimerHandle | None = None
    _app: RefusingApp | None = None
    _held: bytearray | None = None  # body of a request without a cycle
    _refused = False  # the last request, in the present data

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin: the headers must come in time."""
        super().connection_made(cast(asyncio.Transport, _Joined(transport, self.loop)))
        app = self.config.app
        self._app = app if isinstance(app, RefusingApp) else None
        find_lost_peers(transport.get_extra_info("socket"))
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Handle a part of a request."""
        self._refused = False
        super().data_received(data)
        if self._held is not None:
            self._begin_cycle()
        if self._refused:
            self.on_response_complete()  # the connection is at rest
        self._bound_head(len(data))
        self._expect_head()

    def on_message_begin(self) -> None:
        """Begin the headers of a request."""
        self._in_head, self._head_bytes, self._refused = True, 0, False
        super().on_message_begin()
        cast(Scope, self.scope)[CONNECTIONS] = len(self.connections)

    def on_headers_complete(self) -> None:
        """End the headers of a request.

        Raises:
            ValueError: it does not name one host (RFC 9112, section 3.2), which is answered by 400.
        """
        self._in_head = False
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() != "1.0"):
            raise ValueError("a request names one host")
        if self._may_refuse():
            self._held = bytearray()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        if self._held is None:
            super().on_body(body)
        else:
            self._held += body

    def on_message_complete(self) -> None:
        """End a request: it is refused, or its cycle has all of it."""
        if self._held is not None:
            if self._refuse():
                return
            self._begin_cycle()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_head()
        self._stop_stalled()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for a client who reads slowly."""
        super().pause_writing()
        self._stop_stalled()
        self._stalled = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop_stalled()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        body = msgspec.json.encode(envelope(BadRequestError(msg)))
        head = [
            b"HTTP/1.1 400 Bad Request",
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
        ]
        self.transport.write(b"\r\n".join([*head, b"", body]))
        self.transport.close()

    def _may_refuse(self) -> bool:
        """Return True for a request whose answer, sent at once, is in turn and keeps all open."""
        if self._app is None or not self._app.may_refuse(self.url):
            return False
        in_turn = not self._is_answering() and self._stalled is None
        return in_turn and not self.expect_100_continue and _is_plain_post(self.parser)

    def _refuse(self) -> bool:
        """Send the answer to the request that is held, if the application refuses it."""
        app, held = self._app, self._held
        assert app is not None and held is not None
        scope = {**self.scope, "method": "POST", "path": self.url.decode("ascii")}
        answer = app.refusal(scope, self.url, bytes(held))
        if answer is None:
            return False
        headers = [*self.server_state.default_headers, *answer.raw_headers]
        lines = [b"%b: %b\r\n" % header for header in headers]
        body = bytes(answer.body)
        self.transport.write(b"".join([STATUS_LINE[answer.status_code], *lines, b"\r\n", body]))
        self._held, self._refused = None, True
        self._stop_head()  # the next one has its own time
        return True

    def _begin_cycle(self) -> None:
        """Let the application answer the request that is held."""
        held, self._held = self._held, None
        super().on_headers_complete()
        if held:
            super().on_body(bytes(held))

    def _bound_head(self, size: int) -> None:
        """Refuse headers that are too large, once another piece of them has come."""
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += size
            if self._head_bytes > _HEAD_BYTES:
                self.send_400_response("the headers are too large: send fewer")

    def _expect_head(self) -> None:
        """Bound the time until a request is being answered, or is refused."""
        if self._is_answering() or self._refused:
            self._stop_head()
        elif self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self.transport.close)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def _is_plain_post(parser: httptools.HttpRequestParser) -> bool:
    """Return True for a POST request after which the connection is used as before."""
    if parser.get_method() != b"POST" or parser.get_http_version() != "1.1":
        return False
    return parser.should_keep_alive() and not parser.should_upgrade()


def find_lost_peers(connection: socket.socket | None) -> None:
    """Let the kernel close a connection whose other end is gone without a word."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
