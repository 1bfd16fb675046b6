"""Checks of values that a caller passed in. Each raises an error of one short line."""

import reprlib
from collections.abc import Callable
from typing import Any

from latentforge.runtime.errors import SettingsError

__all__ = ["check_count", "check_items", "check_number", "shown"]


def check_count(name: str, value: int, max: int) -> None:
    """Check that a value is an integer from 1 to `max`.

    Raises:
        SettingsError: it is not.
    """
    if type(value) is not int or not 1 <= value <= max:
        raise SettingsError(f"{name} must be an integer from 1 to {max}, not {shown(value)}")


def check_number(name: str, value: float, min: float, max: float) -> None:
    """Check that a value is a finite number from `min` to `max`.

    Raises:
        SettingsError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not min <= value <= max:  # False for NaN
        raise SettingsError(f"{name} must be a number from {min} to {max}, not {shown(value)}")


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
    """Return the repr of a value, shortened to one line, even for an integer of 10,000 digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "this value"
