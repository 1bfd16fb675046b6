"""Client that measures answers by the kernel's clock.

A client and a server on the same cores delay each other. The kernel stamps each packet as it
arrives, so that the time until this process gets around to reading an answer is not counted; what
the server waited for a core is. The server's log has its own times, see server_process.py.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = [
    "Answer",
    "Client",
    "Outcomes",
    "closed_load",
    "open_load",
    "percentile",
    "quantiles",
]

_TIMESTAMPS = 35  # SO_TIMESTAMPNS of Linux, which the module socket does not name
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_PIECE = 1 << 16  # bytes: larger buffers come from the system, page by page
_SECONDS = 600.0  # for an answer
_REFUSED = 0.2  # seconds until a client that was refused tries again


class Answer(NamedTuple):
    """Answer to a request.

    Attributes:
        status: of HTTP, or the name of an error that came in its place.
        seconds: from sending the request to the arrival of the answer's last byte.
        body: of the answer.
    """

    status: str
    seconds: float
    body: bytes = b""

    def json(self) -> Any:
        """Return the body's content."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """Client of one server, with a connection for each request that is on its way.

    Attributes:
        host, port: of the server.
        idle: connections that wait for a request.
    """

    host: str
    port: int
    idle: list[_Connection] = field(default_factory=list)

    @classmethod
    def of(cls, url: str) -> Client:
        """Return a client of an address such as http://127.0.0.1:8000."""
        host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
        return cls(host, int(port or 80))

    async def get(self, path: str) -> Answer:
        """Send a GET request."""
        return await self.send(_head(self.host, self.port, "GET", path) + b"\r\n")

    async def post(self, path: str, fields: Mapping[str, Any]) -> Answer:
        """Send a POST request with a JSON body."""
        return await self.send(self.posting(path, json.dumps(fields).encode()))

    def posting(self, path: str, body: bytes) -> bytes:
        """Return a POST request with a JSON body."""
        head = _head(self.host, self.port, "POST", path)
        return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)

    def send(self, request: bytes) -> asyncio.Future[Answer]:
        """Send a request, and return its answer as it comes; an error is one too.

        A request that is cancelled ends its connection, as it leaves an answer behind.
        """
        while self.idle:
            connection = self.idle.pop()
            if connection.is_open():
                break
        else:
            connection = _Connection(self)
        return connection.send(request)

    def close(self) -> None:
        """Close the connections that wait."""
        while self.idle:
            self.idle.pop().close()


@lru_cache(maxsize=64)
def _head(host: str, port: int, method: str, path: str) -> bytes:
    """Return the start of a request."""
    kind = "content-type: application/json\r\n" if method == "POST" else ""
    return f"{method} {path} HTTP/1.1\r\nhost: {host}:{port}\r\n{kind}".encode()


class _Connection:
    """Connection of a client, with at most one request on its way.

    It takes callbacks from the event loop, and no task for a request, nor for a piece of an answer:
    those would cost the cores that the server has as much again.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError):  # another system: answers are stamped as they are read
            self._socket.setsockopt(socket.SOL_SOCKET, _TIMESTAMPS, 1)
        self._socket.connect_ex((client.host, client.port))  # an error comes as it is read
        self._loop.add_reader(self._socket, self._read)

    def is_open(self) -> bool:
        """Return True if a connection that waits is open, as far as is known in this loop."""
        if self._loop is asyncio.get_running_loop():
            try:
                self._socket.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return True
            except OSError:
                pass
        self.close()
        return False

    def send(self, request: bytes) -> asyncio.Future[Answer]:
        """Send a request, and return its answer as it comes."""
        self._answer: asyncio.Future[Answer] = self._loop.create_future()
        self._answer.add_done_callback(self._end)
        self._timer = self._loop.call_later(_SECONDS, self._fail, TimeoutError())
        self._received, self._unsent, self._start = b"", request, time.time()
        self._write()
        return self._answer

    def close(self) -> None:
        """Close it, if it is open."""
        if self._socket.fileno() >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._socket.close()

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._go_on_writing)
        except OSError as error:
            self._fail(error)

    def _go_on_writing(self) -> None:
        self._loop.remove_writer(self._socket)
        self._write()

    def _read(self) -> None:
        try:
            piece, notes, _, _ = self._socket.recvmsg(_PIECE, 64)
            if not piece:
                raise EOFError("the connection was closed before the end")
            self._received += piece
            complete = _is_complete(self._received)
        except BlockingIOError:
            return
        except (OSError, EOFError, ValueError) as error:
            self._fail(error)
            return
        if complete:
            head, _, body = self._received.partition(_HEAD_END)
            status, seconds = head.split(None, 2)[1].decode(), _stamp(notes) - self._start
            self._answer.set_result(Answer(status, seconds, body))

    def _fail(self, error: Exception) -> None:
        """Answer by an error, and close the connection."""
        self.close()
        if not self._answer.done():
            self._answer.set_result(Answer(type(error).__name__, time.time() - self._start))

    def _end(self, answer: asyncio.Future[Answer]) -> None:
        self._timer.cancel()
        if answer.cancelled():
            self.close()
        elif self._socket.fileno() >= 0:
            self._client.idle.append(self)


def _is_complete(received: bytes) -> bool:
    """Return True if all of an answer has come.

    Raises:
        ValueError: the answer does not say how long it is.
    """
    end = received.find(_HEAD_END)
    if end < 0:
        return False
    length = _LENGTH.search(received, 0, end)
    if length is None:
        raise ValueError("the answer has no content-length")
    return len(received) >= end + len(_HEAD_END) + int(length[1])


def _stamp(notes: Iterable[tuple[int, int, bytes]]) -> float:
    """Return the time of arrival in a message's notes; the present without one."""
    for level, kind, data in notes:
        if (level, kind) == (socket.SOL_SOCKET, _TIMESTAMPS):
            seconds, nanoseconds = struct.unpack("@ll", data[: struct.calcsize("@ll")])
            return float(seconds) + nanoseconds * 1e-9
    return time.time()


@dataclass(kw_only=True)
class Outcomes:
    """Answers of a load.

    Attributes:
        seconds: times of the answers by status.
        elapsed: time of the load, in seconds.
        in_time: images that came within it.
        own_cpu: seconds of processor time that the clients took in it.
        lag: how late the clients were, in seconds, at each request.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    elapsed: float = 0.0
    in_time: int = 0
    own_cpu: float = 0.0
    lag: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.in_time / self.elapsed

    def add(self, answer: Answer) -> None:
        """Add an answer."""
        self.seconds.setdefault(answer.status, []).append(answer.seconds)

    def times(self, status: str) -> list[float]:
        """Return the times of the answers of a status."""
        return self.seconds.get(status, [])

    def summary(self) -> dict[str, Any]:
        """Return counts and percentiles."""
        return {
            "images_per_second": round(self.rate, 4),
            "seconds": round(self.elapsed, 2),
            "generator_cpu_seconds": round(self.own_cpu, 2),
            "generator_lag_p99": round(percentile(self.lag, 99), 5) if self.lag else None,
            "answers": {status: quantiles(times) for status, times in sorted(self.seconds.items())},
        }


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Return the number of some times, and their percentiles in seconds."""
    points = {f"p{point}": round(percentile(times, point), 5) for point in (50, 95, 99)}
    return {"count": len(times), **points, "max": round(max(times), 5)}


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which this percentage of values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


Send = Callable[[int], Awaitable[Answer]]
"""Function that sends the request of a number, and returns its answer as it comes."""


async def closed_load(send: Send, clients: int, seconds: float) -> Outcomes:
    """Let clients send a request as soon as they are answered, and wait for the last answers.

    One that is refused waits a moment: a thousand refusals a second would leave no core to measure.
    """
    found, cpu, start = Outcomes(), time.process_time(), time.perf_counter()
    numbers = iter(range(1 << 60))

    async def client() -> None:
        while time.perf_counter() - start < seconds:
            answer = await send(next(numbers))
            found.add(answer)
            if answer.status == "503":
                await asyncio.sleep(_REFUSED)

    await asyncio.gather(*(client() for _ in range(clients)))
    found.elapsed, found.own_cpu = time.perf_counter() - start, time.process_time() - cpu
    found.in_time = len(found.times("200"))
    return found


async def open_load(send: Send, rate: float, seconds: float) -> Outcomes:
    """Send requests at random times, at a rate per second, and wait for all answers.

    They come whether earlier ones were answered or not (Poisson): clients that wait for answers
    would hide the queue (coordinated omission).
    """
    arrivals = _Arrivals(send, rate, seconds)
    cpu, start = time.process_time(), time.perf_counter()
    await arrivals.ended
    await asyncio.sleep(max(0.0, start + seconds - time.perf_counter()))
    found = arrivals.found
    found.elapsed, found.own_cpu = time.perf_counter() - start, time.process_time() - cpu
    found.in_time = len(found.times("200"))
    await asyncio.gather(*arrivals.waiting)
    await asyncio.sleep(0)  # until the last of them is counted
    return found


class _Arrivals:
    """Requests at random times, sent by callbacks of the event loop.

    Args:
        send: sends the request of a number.
        rate: requests per second.
        seconds: for which they come.

    Attributes:
        found: their answers.
        waiting: those that have not come.
        ended: done once all requests are sent.
    """

    def __init__(self, send: Send, rate: float, seconds: float) -> None:
        self.found = Outcomes()
        self.waiting: set[asyncio.Future[Answer]] = set()
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._send, self._rate, self._numbers = send, rate, itertools.count()
        self._draw = random.Random(0)
        self._due = self._loop.time()
        self._end = self._due + seconds
        self._wait()

    def _wait(self) -> None:
        self._due += self._draw.expovariate(self._rate)
        if self._due < self._end:
            self._loop.call_at(self._due, self._arrive)
        else:
            self.ended.set_result(None)

    def _arrive(self) -> None:
        self.found.lag.append(max(0.0, self._loop.time() - self._due))
        answer = asyncio.ensure_future(self._send(next(self._numbers)))
        self.waiting.add(answer)
        answer.add_done_callback(self._count)
        self._wait()

    def _count(self, answer: asyncio.Future[Answer]) -> None:
        self.waiting.discard(answer)
        self.found.add(answer.result())
