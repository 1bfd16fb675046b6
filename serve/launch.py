"""Launch of a server: from options to a process that answers requests."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from latentforge.runtime.errors import SettingsError
from latentforge.serve.http.app import create_app
from latentforge.serve.http.context import Context, HttpOptions
from latentforge.serve.http.server import ServerOptions, connection_limit, listen, run
from latentforge.serve.keys import KeyRing
from latentforge.serve.logs import LogFormat, log_to
from latentforge.serve.scheduler import BatchGains
from latentforge.serve.service import ModelSource, Service, ServiceOptions
from latentforge.serve.share import ShareStore

__all__ = ["Address", "ServeOptions", "launch", "model_sources"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SWITCH_SECONDS = 0.001  # between threads of Python
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Address:
    """Address to listen at.

    Attributes:
        host: name or IP address of one of this machine's interfaces.
        port: 0 for any that is free.
        insecure: True to let other machines in without a key.

    Raises:
        SettingsError: the port does not exist.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    insecure: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise SettingsError(f"a port is a number from 0 to 65535, not {self.port}")

    @property
    def local(self) -> bool:
        """True if no other machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self, ring: KeyRing) -> None:
        """Refuse to open the server to other machines without a key.

        Raises:
            SettingsError: it would be.
        """
        if not (self.local or ring.keys or self.insecure):
            raise SettingsError(
                f"{self.host} lets other machines in, and no key is set: give --keys FILE (by "
                "--new-key NAME), or --insecure if the network is trusted"
            )


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of a server.

    Attributes:
        sources: models.
        address: to listen at.
        ring: keys.
        service: queue and workers.
        http: the interface.
        server: the process.
        shares: folder of shared images; None for none.
        log: format of the log.
        debug: log everything.
    """

    sources: Sequence[ModelSource]
    address: Address = Address()
    ring: KeyRing = field(default_factory=KeyRing)
    service: ServiceOptions = ServiceOptions()
    http: HttpOptions = HttpOptions()
    server: ServerOptions = ServerOptions()
    shares: Path | None = None
    log: LogFormat = "json"
    debug: bool = False


def model_sources(
    engines: Sequence[str], options: dict[str, bool | int | float | str | None], replicas: int = 1
) -> tuple[ModelSource, ...]:
    """Return the models of arguments such as ``engines/`` or ``NAME=engines/``.

    Args:
        engines: the arguments; without a name, a model has that of its folder.
        options: arguments of load().
        replicas: processes of each.

    Raises:
        SettingsError: a name is no name.
    """
    return tuple(_source(text, options, replicas) for text in engines)


def _source(
    text: str, options: dict[str, bool | int | float | str | None], replicas: int
) -> ModelSource:
    name, separator, path = text.partition("=")
    if not (separator and _NAME.fullmatch(name)):
        name, path = Path(text).absolute().name, text
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} cannot be the name of a model, which has letters, digits, dots, dashes and "
            f"underlines: give NAME={text}"
        )
    return ModelSource(name=name, directory=Path(path), replicas=replicas, options=options)


def launch(
    options: ServeOptions,
    announce: Callable[[str, Service], None] = lambda url, service: None,
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal, and return the exit status.

    Args:
        options: of the server.
        announce: called with its address and the service, before the models are loaded.
        ready: called when they are.

    Raises:
        SettingsError: the address is used, or open to other machines without a key.
        LatentforgeError: a model does not load.
    """
    options.address.check(options.ring)
    bound = listen(options.address.host, options.address.port)
    with bound:
        return asyncio.run(_serve(options, bound, announce, ready))


async def _serve(
    options: ServeOptions,
    bound: socket.socket,
    announce: Callable[[str, Service], None],
    ready: Callable[[], None],
) -> int:
    service = Service(
        options.sources, options=options.service, ring=options.ring, gains=BatchGains()
    )
    log_to(sys.stderr, options.log, debug=options.debug)
    host, port = bound.getsockname()[:2]
    context = Context(
        service=service,
        metrics=service.metrics,
        options=options.http,
        shares=None if options.shares is None else ShareStore.open(options.shares, time.time()),
    )
    keys = options.ring.owner if options.ring.keys else None
    app = create_app(
        context, authenticate=keys, hosts=_hosts(options), connections=connection_limit()
    )
    shown = f"[{host}]" if ":" in host else host
    announce(f"http://{shown}:{port}", service)
    with _prompt_answers():
        return await run(app, service, bound, options.server, ready)


@contextmanager
def _prompt_answers() -> Iterator[None]:
    """Let the event loop wait for nothing else in this process for long.

    It waits for the interpreter's lock a switch interval for each thread that wants it too, and
    for the garbage collector, which otherwise looks through all that was imported.
    """
    threads = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "latentforge")
    asyncio.get_running_loop().set_default_executor(threads)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)


def _hosts(options: ServeOptions) -> frozenset[str] | None:
    """Return the only names by which browsers reach a server without keys; None for any.

    A page of another site could otherwise give its own name this machine's address.
    """
    if options.ring.keys or not options.address.local:
        return None
    return frozenset({*_LOCAL, options.address.host})
