"""Numbers as text, for tables, pages and messages. Unknown and non-finite values are a dash."""

import math
from datetime import datetime, timezone
from typing import TypeGuard

from latentforge.runtime.image import MAX_PSNR
from latentforge.runtime.text import size_text

__all__ = [
    "DASH",
    "decibels",
    "estimate",
    "is_number",
    "joules",
    "level",
    "number",
    "percentage",
    "seconds",
    "seconds_range",
    "size",
    "speedup",
    "timestamp",
]

DASH = "–"


def is_number(value: float | None) -> TypeGuard[float]:
    """Return True if a value is known and finite."""
    return value is not None and math.isfinite(value)


def seconds(value: float | None) -> str:
    """Return a duration with three significant digits, in milliseconds below one second."""
    if not is_number(value):
        return DASH
    return f"{_three_digits(value)} s" if value >= 1 else f"{_three_digits(value * 1e3)} ms"


def seconds_range(low: float, high: float) -> str:
    """Return a range of durations, with the unit written once if both ends share it."""
    first, last = seconds(low), seconds(high)
    digits, _, unit = first.partition(" ")
    return f"{digits}–{last}" if last.endswith(f" {unit}") else f"{first} – {last}"


def size(count: float | None) -> str:
    """Return a number of bytes in MB or GB."""
    return size_text(count) if is_number(count) else DASH


def joules(value: float | None) -> str:
    """Return an energy with three significant digits."""
    return f"{_three_digits(value)} J" if is_number(value) else DASH


def speedup(value: float | None) -> str:
    """Return a speedup factor with two decimals."""
    return f"{value:.2f}×" if is_number(value) else DASH


def decibels(value: float | None) -> str:
    """Return a PSNR, or ``identical`` for equal images (image.MAX_PSNR)."""
    if not is_number(value):
        return DASH
    return "identical" if value >= MAX_PSNR else f"{value:.1f} dB"


def percentage(value: float) -> str:
    """Return a fraction in percent with one decimal."""
    return f"{value:.1%}" if is_number(value) else DASH


def level(value: float) -> str:
    """Return a confidence level in percent with at most one decimal, such as ``93.8 %``."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def number(value: float | None, unit: str = "") -> str:
    """Return any quantity with four significant digits."""
    return f"{value:.4g} {unit}".strip() if is_number(value) else DASH


def estimate(value: float | None) -> str:
    """Return a quantity whose interval stands beside it, with two significant digits."""
    return f"{value:.2g}" if is_number(value) else DASH


def timestamp(date: str) -> str:
    """Return an ISO 8601 date to the minute, in UTC; return any other text unchanged."""
    try:
        when = datetime.fromisoformat(date).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return date
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _three_digits(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
