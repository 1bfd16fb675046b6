"""HTTP connections that do not wait for ever for clients who send or read too slowly."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentforge.serve.errors import BadRequestError
from latentforge.serve.http.envelope import envelope

__all__ = ["BoundedConnection", "find_lost_peers"]

_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
"""Options by which the kernel finds out that the other machine is gone."""


class BoundedConnection(H11Protocol):
    """Connection that is closed if a request's headers, or the reading of an answer, take long.

    Attributes:
        head_seconds: time from the first byte of a request, or from the connection, to the end of
            its headers.
        read_seconds: time in which a client must read some ten kilobytes of an answer that waits.
    """

    head_seconds = 10.0
    read_seconds = 60.0
    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin: the headers must come in time."""
        super().connection_made(transport)
        find_lost_peers(transport.get_extra_info("socket"))
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Handle a part of a request."""
        super().data_received(data)
        self._expect_head()

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

    def _expect_head(self) -> None:
        """Bound the time until a request is being answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._stop_head()
        elif self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def find_lost_peers(connection: socket.socket | None) -> None:
    """Let the kernel close a connection whose other end is gone without a word."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
