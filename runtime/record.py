"""Base class of the records that are stored as JSON or TOML."""

from typing import Any, TypeVar

import msgspec

from latentforge.runtime.text import printable

__all__ = ["Record", "escaped"]

_T = TypeVar("_T", bound=msgspec.Struct)


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frozen record that refuses unknown keys when it is decoded."""


def escaped(record: _T) -> _T:
    """Return a record with every text in it escaped, for output: see printable().

    So a text of a file neither controls a terminal nor adds a line to what is printed.
    """
    return msgspec.convert(_escaped(msgspec.to_builtins(record)), type(record))


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return value
