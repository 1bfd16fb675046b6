"""Server in a process of its own: its start and end, memory, processor time, gauges and log."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from background import start_process

__all__ = ["ServerProcess", "free_port", "latentforge_server", "running"]

_SAMPLE = re.compile(r"^latentforge_(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_START = 600.0  # seconds, a measurement of batches included
_END = 20.0


@dataclass(frozen=True, kw_only=True)
class ServerProcess:
    """Server that runs.

    Attributes:
        process: the one that was started; further ones are its children.
        port: at 127.0.0.1.
        log: file of what it prints.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return list(_family(self.process.pid))

    def memory(self) -> int:
        """Return the bytes of memory that its processes hold."""
        page = os.sysconf("SC_PAGE_SIZE")
        return sum(int(_stat(pid, "statm").split()[1]) * page for pid in self.pids)

    def cpu(self) -> float:
        """Return the seconds of processor time that its processes have taken."""
        ticks = os.sysconf("SC_CLK_TCK")
        fields = (_stat(pid, "stat").rpartition(")")[2].split() for pid in self.pids)
        return sum(int(values[11]) + int(values[12]) for values in fields) / ticks

    def metrics(self) -> dict[str, float]:
        """Return the metrics of latentforge's server by name, as sums over all labels."""
        found: dict[str, float] = {}
        for name, value in _SAMPLE.findall(self._get("/metrics")[1]):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def logged(self, offset: int = 0) -> dict[str, list[float]]:
        """Return the seconds of requests for images by status, by the server's own clock.

        Args:
            offset: bytes of the log that are left out, from its start.
        """
        found: dict[str, list[float]] = {}
        for line in self.log.read_bytes()[offset:].splitlines():
            entry = _entry(line)
            if entry.get("route") == "/v1/images/generations":
                found.setdefault(str(entry["status"]), []).append(entry["seconds"])
        return found

    def answers(self, path: str) -> bool:
        """Return True if a path is answered by status 200."""
        with suppress(OSError, http.client.HTTPException):
            return self._get(path)[0] == 200
        return False

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    ready: str = "/readyz",
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """Start a server that listens at a port, and end it with the block.

    Args:
        command: of the server.
        port: that it listens at.
        log: file for what it prints.
        ready: path that it answers by status 200 once it can make images.
        environment: variables that it has beside this process's.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message has the end of its log.
    """
    log.unlink(missing_ok=True)
    process = start_process(command, log, environment)
    server = ServerProcess(process=process, port=port, log=log)
    try:
        _wait(server, ready)
        yield server
    finally:
        _end(process)


@contextmanager
def latentforge_server(engines: Path, log: Path, *options: str) -> Iterator[ServerProcess]:
    """Run ``latentforge serve`` with options."""
    port = free_port()
    command = [sys.executable, "-m", "latentforge", "serve", str(engines), "--port", str(port)]
    with running([*command, *options], port, log) as server:
        yield server


def _wait(server: ServerProcess, ready: str) -> None:
    end = time.monotonic() + _START
    while not server.answers(ready):
        if server.process.poll() is not None or time.monotonic() > end:
            lines = server.log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(" ".join(lines[-2:]) or "the server ended without a word")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _family(pid: int) -> Iterator[int]:
    """Yield a process and all that come from it."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _stat(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def _entry(line: bytes) -> dict[str, Any]:
    """Return a line of the log; empty if it is not JSON."""
    with suppress(ValueError):
        content = json.loads(line)
        return content if isinstance(content, dict) else {}
    return {}
