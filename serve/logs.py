"""Log lines in JSON, one object each, without prompts unless they are wanted."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TextIO

import msgspec

from latentforge.runtime.text import one_line, printable

__all__ = ["JsonLines", "LogFormat", "RequestLog", "TextLines", "log_to"]

_ESCAPER = json.JSONEncoder(default=str)
"""Encoder of what has other characters than those of ASCII: some control terminals."""

LogFormat = Literal["json", "text"]

FIELDS = "latentforge_fields"
"""Attribute of a log record that holds further fields."""


class JsonLines(logging.Formatter):
    """Formatter of a record as one JSON object on a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        values = {
            "time": _moment(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(one_line(record.getMessage(), limit=None)),
            **{k: v for k, v in getattr(record, FIELDS, {}).items() if v is not None},
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        line = msgspec.json.encode(values, enc_hook=str)
        return line.decode() if line.isascii() else _ESCAPER.encode(values)


class TextLines(logging.Formatter):
    """Formatter of a record as a line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: Mapping[str, Any] = getattr(record, FIELDS, {})
        details = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        text = f"{_moment(record.created)} {record.levelname.lower()} {record.getMessage()}"
        line = printable(one_line(f"{text} {details}".rstrip(), limit=None))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def log_to(stream: TextIO, format: LogFormat, *, debug: bool = False) -> None:
    """Write all records to a stream, in place of the handlers that there are."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("latentforge").setLevel(logging.DEBUG if debug else logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # of clients' damaged forms
    logging.captureWarnings(True)


@dataclass(frozen=True, kw_only=True)
class RequestLog:
    """Log of answered requests.

    Attributes:
        quiet: routes that are polled, and logged only when they fail.
    """

    quiet: frozenset[str] = frozenset()

    def write(self, fields: Mapping[str, Any], *, route: str, status: int) -> None:
        """Write the line of a request."""
        level = logging.WARNING if status >= 500 else logging.INFO
        if status < 400 and route in self.quiet:
            level = logging.DEBUG
        logger = logging.getLogger("latentforge.serve.requests")
        if logger.isEnabledFor(level):  # without a search for the line of the program that logs
            record = logging.LogRecord(logger.name, level, "", 0, "request", (), None)
            setattr(record, FIELDS, {"route": route, "status": status, **fields})
            logger.handle(record)


def _moment(seconds: float) -> str:
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
