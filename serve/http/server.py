"""Server process: the socket, the event loop, and the signals that end it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from latentforge.runtime.errors import SettingsError
from latentforge.serve.http.connection import BoundedConnection

__all__ = ["INTERRUPTED", "ServerOptions", "connection_limit", "listen", "run"]

INTERRUPTED = 130
"""Exit status after a second signal."""

_log = logging.getLogger("latentforge.serve")

_SPARE_FILES = 256  # of the process, beside those of connections
_LAST_ANSWERS = 5.0  # seconds for clients to read, after the last job
_SAME = 0.25  # seconds: a second signal by then is the first one again, as ``timeout`` sends it


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the process.

    Attributes:
        drain_seconds: time for accepted requests after the first SIGTERM.
        keep_alive: seconds for which a connection without a request is kept.
    """

    drain_seconds: float = 60.0
    keep_alive: int = 30


class Runnable(Protocol):
    """Service that runs while the server does."""

    async def start(self) -> None:
        """Load the models."""

    async def drain(self, timeout: float) -> None:
        """Accept nothing more, and wait for what was accepted; then end the rest."""

    async def close(self) -> None:
        """End the workers."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        SettingsError: the address is used, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends what it has at once only on sockets of a named protocol: answers in two parts
    # would wait some 40 ms for the client's acknowledgement of the first.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            f"cannot listen at {host}:{port}: {reason}; choose another --port"
        ) from error
    return bound


class _Server(uvicorn.Server):
    """Uvicorn's server, whose signals are handled here."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


async def run(
    app: ASGIApp,
    service: Runnable,
    bound: socket.socket,
    options: ServerOptions = ServerOptions(),
    started: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal, and return the exit status.

    The first SIGTERM or SIGINT lets accepted requests end, and the second ends at once.

    Args:
        app: application.
        service: that it hands requests to; it starts while the server already answers /livez.
        bound: socket to listen at.
        options: of the process.
        started: called when the service has started.
    """
    server = _Server(_configuration(app, options))
    ending = _Ending(server, service, options)
    serving = asyncio.ensure_future(server.serve(sockets=[bound]))
    try:
        with ending.signals():
            await _until_started(service, started, ending)
            await asyncio.wait({serving, ending.forced}, return_when=asyncio.FIRST_COMPLETED)
        return INTERRUPTED if ending.forced.done() else 0
    finally:
        await _end(service, serving)


async def _until_started(service: Runnable, started: Callable[[], None], ending: _Ending) -> None:
    """Start the service, unless a signal comes first."""
    starting = asyncio.ensure_future(service.start())
    await asyncio.wait({starting, ending.begun}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    starting.result()
    started()


async def _end(service: Runnable, serving: asyncio.Future[None]) -> None:
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
    await service.close()


def _configuration(app: ASGIApp, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedConnection,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=512,
        timeout_keep_alive=options.keep_alive,
        timeout_graceful_shutdown=int(_LAST_ANSWERS),
    )


def connection_limit() -> int:
    """Return the most connections, after asking the system for as many files as it allows."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(64, min(soft, 1 << 16) - _SPARE_FILES)


class _Ending:
    """Reaction to signals.

    Attributes:
        begun: done after the first.
        forced: done after the second.
    """

    def __init__(self, server: uvicorn.Server, service: Runnable, options: ServerOptions) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = loop.create_future()
        self.forced: asyncio.Future[None] = loop.create_future()
        self._server = server
        self._service = service
        self._seconds = options.drain_seconds
        self._first = 0.0
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT while the block runs."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._receive, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _receive(self, number: int) -> None:
        name, loop = signal.Signals(number).name, asyncio.get_running_loop()
        if self._draining is None:
            self._first = loop.time()
            self.begun.set_result(None)
            _log.info("%s: accepted requests end within %g s", name, self._seconds)
            self._draining = asyncio.ensure_future(self._drain())
        elif not self.forced.done() and loop.time() - self._first > _SAME:
            _log.warning("second signal (%s): ending at once", name)
            self.forced.set_result(None)

    async def _drain(self) -> None:
        try:
            await self._service.drain(self._seconds)
        finally:
            self._server.should_exit = True
