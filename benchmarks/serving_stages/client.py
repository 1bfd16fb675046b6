"""Client that measures answers by the kernel's clock.

A client and a server on the same cores delay each other. The kernel stamps each packet as it
arrives, so that the time until this process gets around to reading an answer is not counted; what
the server waited for a core is. The server's log has its own times, see server_process.py.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

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
_PIECE = 1 << 18
_SECONDS = 600.0  # for an answer
_REFUSED = 0.2  # seconds until a client that was refused tries again


@dataclass(frozen=True, kw_only=True)
class Answer:
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
    idle: list[socket.socket] = field(default_factory=list)

    @classmethod
    def of(cls, url: str) -> Client:
        """Return a client of an address such as http://127.0.0.1:8000."""
        host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
        return cls(host, int(port or 80))

    async def get(self, path: str) -> Answer:
        """Send a GET request."""
        return await self._request(self._head("GET", path))

    async def post(self, path: str, fields: Mapping[str, Any]) -> Answer:
        """Send a POST request with a JSON body."""
        body = json.dumps(fields).encode()
        headers = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return await self._request(self._head("POST", path, headers) + body)

    def close(self) -> None:
        """Close the connections that wait."""
        while self.idle:
            self.idle.pop().close()

    def _head(self, method: str, path: str, headers: str = "") -> bytes:
        host = f"{self.host}:{self.port}"
        return f"{method} {path} HTTP/1.1\r\nhost: {host}\r\n{headers}\r\n".encode()

    async def _request(self, request: bytes) -> Answer:
        try:
            connection = await self._connected()
        except OSError as error:
            return Answer(status=type(error).__name__, seconds=0.0)
        start = time.time()
        try:
            answer = await _exchanged(connection, request, start)
        except (OSError, EOFError, ValueError) as error:
            connection.close()
            return Answer(status=type(error).__name__, seconds=time.time() - start)
        except BaseException:  # a request that is cancelled leaves an answer behind
            connection.close()
            raise
        self.idle.append(connection)
        return answer

    async def _connected(self) -> socket.socket:
        """Return a connection that is open, as far as is known here."""
        while self.idle:
            connection = self.idle.pop()
            with suppress(BlockingIOError):
                connection.recv(1, socket.MSG_PEEK)  # the server has closed it
                connection.close()
                continue
            return connection
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError):  # another system: answers are stamped as they are read
            connection.setsockopt(socket.SOL_SOCKET, _TIMESTAMPS, 1)
        try:
            await asyncio.get_running_loop().sock_connect(connection, (self.host, self.port))
        except BaseException:
            connection.close()
            raise
        return connection


async def _exchanged(connection: socket.socket, request: bytes, start: float) -> Answer:
    """Send a request and return its answer.

    A timer ends the connection after a time: a task that is waited for would cost the cores that
    the server has as much again.
    """
    loop = asyncio.get_running_loop()
    timer = loop.call_later(_SECONDS, _end, connection)
    try:
        await loop.sock_sendall(connection, request)
        received, arrived = bytearray(), start
        while (length := _missing(received)) != 0:
            piece, arrived = await _received(loop, connection)
            if not piece:
                raise EOFError(f"the connection was closed {length} bytes before the end")
            received += piece
    finally:
        timer.cancel()
    head, _, body = bytes(received).partition(_HEAD_END)
    status = head.split(None, 2)[1].decode()
    return Answer(status=status, seconds=arrived - start, body=body)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _missing(received: bytearray) -> int:
    """Return the bytes that an answer lacks, at least.

    Raises:
        ValueError: the answer does not say how long it is.
    """
    end = received.find(_HEAD_END)
    if end < 0:
        return 1
    length = _LENGTH.search(received, 0, end)
    if length is None:
        raise ValueError("the answer has no content-length")
    return max(0, end + len(_HEAD_END) + int(length[1]) - len(received))


async def _received(
    loop: asyncio.AbstractEventLoop, connection: socket.socket
) -> tuple[bytes, float]:
    """Return what has arrived, and when."""
    readable = loop.create_future()
    loop.add_reader(connection, _set, readable)
    try:
        await readable
    finally:
        loop.remove_reader(connection)
    piece, notes, _, _ = connection.recvmsg(_PIECE, 64)
    return piece, _stamp(notes)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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


Send = Callable[[int], Any]
"""Function that sends the request of a number, as a coroutine that returns an Answer."""


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
    found, tasks, draw = Outcomes(), [], random.Random(0)
    cpu, start, due = time.process_time(), time.perf_counter(), draw.expovariate(rate)

    async def one(number: int) -> None:
        found.add(await send(number))

    while due < seconds:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        found.lag.append(max(0.0, time.perf_counter() - start - due))
        tasks.append(asyncio.create_task(one(len(tasks))))
        due += draw.expovariate(rate)
    await asyncio.sleep(max(0.0, start + seconds - time.perf_counter()))
    found.elapsed, found.own_cpu = time.perf_counter() - start, time.process_time() - cpu
    found.in_time = len(found.times("200"))
    await asyncio.gather(*tasks)
    return found
