"""Checks of values that a caller passed in. Each raises an error of one short line."""

import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.text import one_line, printable

__all__ = [
    "check_count",
    "check_flag",
    "check_items",
    "check_max_rows",
    "check_number",
    "check_optional_count",
    "check_prompt_cache",
    "check_threads",
    "checked_path",
    "plain",
    "shown",
]

_MAX_ROWS = 1 << 30
_MAX_THREADS = 4096
_MAX_CACHED = 100_000
_MAX_ITEMS = 100_000
_PLAIN = frozenset({bool, int, float, str, type(None)})
_MAX_PATH, _MAX_NAME = 4096, 255  # bytes, of Linux
_SHOWN = 100  # characters of a value in a message


def plain(value: Any) -> Any:
    """Return a value with numpy's numbers and arrays, and lists, as Python numbers and tuples.

    What has more items than any request needs is returned as it is.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.ndarray) and value.size <= _MAX_ITEMS:
        return plain(value[()]) if value.ndim == 0 else tuple(map(plain, value))
    if isinstance(value, list | tuple | range) and len(value) <= _MAX_ITEMS:
        return tuple(map(plain, value))
    for kind, number in ((np.bool_, bool), (np.integer, int), (np.floating, float)):
        if isinstance(value, kind):
            return number(value)
    return value


def check_count(name: str, value: int, max: int) -> None:
    """Check that a value is an integer from 1 to `max`.

    Raises:
        SettingsError: it is not.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not 1 <= value <= max:
        raise SettingsError(f"{name} must be an integer from 1 to {max}, not {shown(value)}")


def check_threads(value: int) -> None:
    """Check a number of threads; 0 stands for all cores.

    Raises:
        SettingsError: it is no integer from 0 to 4096.
    """
    if isinstance(value, bool) or value != 0:
        check_count("threads", value, _MAX_THREADS)


def check_prompt_cache(value: int) -> None:
    """Check a number of prompts whose embeddings are kept; 0 keeps none.

    Raises:
        SettingsError: it is no integer from 0 to 100,000.
    """
    if isinstance(value, bool) or value != 0:
        check_count("prompt_cache", value, _MAX_CACHED)


def check_number(name: str, value: float, min: float, max: float) -> None:
    """Check that a value is a finite number from `min` to `max`.

    Raises:
        SettingsError: it is not.
    """
    kinds = int | float | np.integer | np.floating
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not min <= value <= max:  # False for NaN
        raise SettingsError(f"{name} must be a number from {min} to {max}, not {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """Check that a value is True or False.

    Raises:
        SettingsError: it is not.
    """
    if not isinstance(value, bool | np.bool_):
        raise SettingsError(f"{name} must be True or False, not {shown(value)}")


def check_optional_count(name: str, value: int | None, max: int) -> None:
    """Check that a value is an integer from 1 to `max`, or None.

    Raises:
        SettingsError: it is not.
    """
    if value is not None:
        check_count(name, value, max)


def check_max_rows(value: int | None) -> None:
    """Check the largest micro-batch of a denoiser step; None is the engines' own.

    Raises:
        SettingsError: it is no integer of at least 1.
    """
    check_optional_count("max_rows", value, _MAX_ROWS)


def checked_path(name: str, value: object) -> Path:
    """Return the path that a caller passed in.

    Raises:
        SettingsError: it is neither a string nor a path, or no file can have this path.
    """
    if not isinstance(value, str | Path):
        raise SettingsError(f"{name} must be a path, not {shown(value)}")
    if not _is_possible(str(value)):
        raise SettingsError(f"{name} is a path that no file can have: {shown(str(value))}")
    return Path(value)


def _is_possible(path: str) -> bool:
    """Return True if the system's calls take a path: encodable, without zero bytes, and short."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        return False
    longest = max(map(len, encoded.split(b"/")))
    return b"\0" not in encoded and len(encoded) < _MAX_PATH and longest <= _MAX_NAME


def check_items(name: str, values: object, check: Callable[[str, Any], None]) -> None:
    """Check that a value is a tuple, and each of its items.

    Raises:
        SettingsError: it is not a tuple, or an item does not pass.
    """
    if not isinstance(values, tuple):
        raise SettingsError(f"{name} must be a tuple of numbers, not {shown(values)}")
    for value in values:
        check(f"each of {name}", value)


def shown(value: object) -> str:
    """Return the repr of a value on a short line, even of 10,000 digits or of nested arrays."""
    try:
        text = printable(one_line(reprlib.repr(value), limit=None))
    except ValueError:
        return "this value"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
