"""Checks of arguments, and of the fields of records, against their annotations.

Requests come from programs whose types nobody may have checked. Values of equal meaning are taken:
numpy's numbers, lists for tuples, and strings for paths.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import (
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.validation import checked_path, plain, shown

__all__ = ["check_fields", "checked_arguments"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_NUMBERS: Mapping[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
}


def check_fields(record: Any) -> None:
    """Check the fields of a frozen dataclass and convert them, in its __post_init__().

    Raises:
        SettingsError: a field has another type than its annotation says.
    """
    annotated: Any = type(record)
    for name, kind in _hints(annotated).items():
        object.__setattr__(record, name, _converted(kind, name, getattr(record, name)))


def checked_arguments(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function that checks and converts its arguments before it runs.

    It raises a SettingsError if an argument has another type than its annotation says.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        bound, hints = signature.bind(*args, **kwargs), _hints(function)
        for name, value in bound.arguments.items():
            several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            kind = GenericAlias(tuple, (hints[name], ...)) if several else hints[name]
            bound.arguments[name] = _converted(kind, name, value)
        return function(*bound.args, **bound.kwargs)

    return checked


@cache
def _hints(annotated: Any) -> dict[str, Any]:
    hints = get_type_hints(annotated)
    hints.pop("return", None)
    return hints


def _converted(kind: Any, name: str, value: Any) -> Any:
    """Return a value in an annotated type, or raise a SettingsError."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (UnionType, Union):
        return _any_of(get_args(kind), name, value)
    if origin is Literal:
        return _choice(get_args(kind), name, value)
    if origin in (tuple, Sequence):
        return _items(get_args(kind)[0], name, value)
    if origin is Mapping or is_typeddict(kind):
        return _entries(get_args(kind) or (str, Any), name, value)
    return _single(origin or kind, name, value)


def _any_of(kinds: Sequence[Any], name: str, value: Any) -> Any:
    if value is None and NoneType in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not NoneType)
    for kind in others:
        with suppress(SettingsError):
            return _converted(kind, name, value)
    return _converted(last, name, value)


def _choice(choices: Sequence[Any], name: str, value: Any) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise _error(name, f"one of {', '.join(map(repr, choices))}", value)
    return value


def _items(kind: Any, name: str, value: Any) -> tuple[Any, ...]:
    values = plain(value)
    if not isinstance(values, tuple):
        raise _error(name, "a tuple", value)
    return tuple(_converted(kind, f"each of {name}", item) for item in values)


def _entries(kinds: tuple[Any, Any], name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _error(name, "a dictionary", value)
    key_kind, kind = kinds
    return {
        _converted(key_kind, f"each key of {name}", key): _converted(kind, f"each of {name}", item)
        for key, item in value.items()
    }


def _single(kind: Any, name: str, value: Any) -> Any:
    """Return a value that is no container."""
    if kind is Path:
        return checked_path(name, value)
    if kind in _NUMBERS:
        return _number(kind, name, value)
    if kind is str:
        return _text(name, value)
    if not (callable(value) if kind is Callable else isinstance(value, kind)):
        raise _error(name, f"a {kind.__name__}", value)
    return value


def _number(kind: Any, name: str, value: Any) -> Any:
    number = plain(value)
    if type(number) is not kind and not (kind is float and type(number) is int):
        raise _error(name, _NUMBERS[kind], value)
    return number


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | Path):
        raise _error(name, "text", value)
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise _error(name, "text without half of a surrogate pair", value) from error
    return str(value)


def _error(name: str, expected: str, value: object) -> SettingsError:
    return SettingsError(f"{name} must be {expected}, not {shown(value)}")
