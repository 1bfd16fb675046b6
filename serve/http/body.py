"""Bodies of requests, read within bounds of size and time, and decoded into records."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.requests import Request

from latentforge.serve.errors import BadRequestError, BusyError, PayloadError, ServeError
from latentforge.serve.http.form import parse_form
from latentforge.serve.http.sse import ClientGoneError

__all__ = [
    "BodyLimits",
    "SlowBodyError",
    "check_media_type",
    "decode",
    "read_form",
    "read_json",
    "read_query",
]

Struct = TypeVar("Struct", bound=msgspec.Struct)

_PATH = re.compile(r" - at `\$\.?([\w.\[\]]*?)(?:\[\.\.\.\])?`")
_UNKNOWN = re.compile(r"unknown field `(.*)`")
_MISSING = re.compile(r"missing required field `(\w+)`")
_LINGER_BYTES, _LINGER_SECONDS = 64 << 20, 5.0


class SlowBodyError(ServeError):
    """Request whose body did not arrive in time."""

    status, kind, code = 408, "invalid_request_error", "request_timeout"


class MediaTypeError(ServeError):
    """Request whose body is of another type."""

    status, kind, code = 415, "invalid_request_error", "unsupported_media_type"


class BodyMemory:
    """Memory that the bodies of all requests may take together, until they are decoded.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int = 1 << 29) -> None:
        self._limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Count bytes that came.

        Raises:
            BusyError: there are too many.
        """
        if self.held + size > self._limit:
            raise BusyError("too many large requests at once: try again", retry_after=2.0)
        self.held += size


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """Bounds of bodies.

    Attributes:
        bytes: of one body.
        chunk_seconds: time until the next piece of it.
        seconds: time until all of it.
        memory: of all bodies together.
    """

    bytes: int = 32 << 20
    chunk_seconds: float = 20.0
    seconds: float = 300.0
    memory: BodyMemory = field(default_factory=BodyMemory, compare=False)


async def read_json(request: Request, type: type[Struct], limits: BodyLimits) -> Struct:
    """Return the body of a request as a record.

    Raises:
        BadRequestError: it is not JSON, or a field is wrong, unknown or missing.
        PayloadError, SlowBodyError, MediaTypeError: it is too large, too slow, or no JSON.
    """
    check_media_type(request.headers, "application/json")
    with _Stream(request, limits) as stream:
        return decode(type, b"".join([chunk async for chunk in stream]))


def decode(type: type[Struct], body: bytes | Mapping[str, Any]) -> Struct:
    """Return a record of JSON, or of the fields of a form.

    Raises:
        BadRequestError: it is not JSON, or a field is wrong, unknown or missing.
    """
    try:
        if isinstance(body, bytes):
            record = msgspec.json.decode(body, type=type)
        else:
            record = msgspec.convert(body, type, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    _check_choices(record)
    return record


def read_query(request: Request, type: type[Struct]) -> Struct:
    """Return the query of a request as a record.

    Raises:
        BadRequestError: a parameter is wrong, unknown, missing, or there twice.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    if repeated := {name for name in names if names.count(name) > 1}:
        name = min(repeated)
        raise BadRequestError(f"{name:.100} stands twice in the query", param=name[:100])
    return decode(type, dict(request.query_params))


def _invalid(error: msgspec.ValidationError) -> BadRequestError:
    """Return the error that names the field."""
    text = str(error)
    path = _PATH.search(text)
    inside = path[1] if path else ""
    field = _UNKNOWN.search(text) or _MISSING.search(text)
    param = ".".join(filter(None, [inside, field[1] if field else ""])) or None
    reason = _PATH.sub("", text)
    reason = reason[:1].lower() + reason[1:]
    return BadRequestError(f"{param}: {reason}" if param else reason, param=param)


def _check_choices(record: msgspec.Struct) -> None:
    """Check the values that the schema lists beside the types of msgspec."""
    for name, choices in _choices(type(record)).items():
        value = getattr(record, name)
        if value is not None and value not in choices:
            listed = ", ".join(msgspec.json.encode(choice).decode() for choice in choices)
            given = msgspec.json.encode(value).decode()
            raise BadRequestError(f"{name} must be {listed}, not {given:.100}", param=name)


@cache
def _choices(record: type[msgspec.Struct]) -> dict[str, tuple[Any, ...]]:
    """Return the ``enum`` of each field of a record that has one in its schema."""
    _, components = msgspec.json.schema_components([record], ref_template="{name}")
    properties = components[record.__name__].get("properties", {})
    found = {name: _enum(schema) for name, schema in properties.items()}
    return {name: tuple(enum) for name, enum in found.items() if enum}


def _enum(schema: Mapping[str, Any]) -> list[Any]:
    parts = [schema, *schema.get("anyOf", [])]
    return [value for part in parts for value in part.get("enum", [])]


def check_media_type(headers: Mapping[str, str], expected: str) -> None:
    """Check the type of a body, by the headers of its request.

    Raises:
        MediaTypeError: it is another.
    """
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != expected:
        raise MediaTypeError(f"the body must be {expected}, not {given or 'without a type'}")


class _Timer:
    """Timer that cancels the task that it was made in, if nothing stops or extends it in time.

    Args:
        seconds: until it does so at the latest.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._end = self._due = self._loop.time() + seconds
        self._handle: asyncio.TimerHandle | None = None
        self._fired = False

    def extend(self, seconds: float) -> None:
        """Cancel the task in this many seconds, or at the end if that is earlier."""
        self._due = min(self._loop.time() + seconds, self._end)
        if self._handle is None or self._handle.when() > self._due:
            self._arm()

    def stop(self) -> None:
        """Cancel nothing."""
        if self._handle is not None:
            self._handle.cancel()

    def ended(self) -> bool:
        """Return True, once, if this timer has cancelled the task and nothing else has."""
        if not self._fired or self._task is None:
            return False
        self._fired = False
        return sys.version_info < (3, 11) or self._task.uncancel() == 0

    def _arm(self) -> None:
        self.stop()
        self._handle = self._loop.call_at(self._due, self._fire)

    def _fire(self) -> None:
        if self._loop.time() < self._due:  # it was extended
            self._arm()
        elif self._task is not None:
            self._fired = True
            self._task.cancel()


class _Stream:
    """Pieces of a body, within bounds. In a ``with`` block they count as held in memory.

    One timer bounds the time, and cancels the block: a task for each piece, as ``wait_for()`` makes
    it, would cost more than all else that is done with a small body.
    """

    def __init__(self, request: Request, limits: BodyLimits) -> None:
        self._receive = request.receive
        self._complete = False
        self._expected = _expected_bytes(request)
        self._waits = "expect" in request.headers  # a client that sends once it is asked to
        self._limits = limits
        self._taken = 0
        self._timer = _Timer(limits.seconds)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.stop()
        self._limits.memory.held -= self._taken
        if kind is asyncio.CancelledError and self._timer.ended():
            raise SlowBodyError("the body did not arrive in time: send it faster, or a smaller one")

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> bytes:
        if self._complete:
            self._timer.stop()
            raise StopAsyncIteration
        if self._expected > self._limits.bytes:
            await self._refuse()
        self._timer.extend(self._limits.chunk_seconds)
        chunk = await self._next()
        self._limits.memory.take(len(chunk))
        self._taken += len(chunk)
        if self._taken > self._limits.bytes:
            await self._refuse()
        return chunk

    async def _next(self) -> bytes:
        """Return the next piece, as Request.stream() yields it in three times the time."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        self._complete = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk

    async def _refuse(self) -> NoReturn:
        """Refuse a body that is too large.

        A little of the rest is read before: a client that still sends would not see the answer.
        """
        self._timer.stop()
        if not self._waits:
            with suppress(asyncio.TimeoutError, ClientGoneError):
                await asyncio.wait_for(self._discard(), _LINGER_SECONDS)
        raise PayloadError(
            f"the body is larger than {self._limits.bytes:,} bytes: send a smaller one"
        )

    async def _discard(self) -> None:
        left = _LINGER_BYTES
        while not self._complete and left >= 0:
            left -= len(await self._next())


def _expected_bytes(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length[:20]) if length.isdigit() else 0


async def read_form(request: Request, limits: BodyLimits) -> dict[str, Any]:
    """Return the fields of a multipart form: text, and bytes of files; lists where repeated.

    Raises:
        BadRequestError: it is no form, or has too many parts.
        PayloadError, SlowBodyError, MediaTypeError: it is too large, too slow, or no form.
    """
    check_media_type(request.headers, "multipart/form-data")
    with _Stream(request, limits) as stream:
        body = b"".join([chunk async for chunk in stream])
        return await asyncio.to_thread(parse_form, body, request.headers["content-type"])
