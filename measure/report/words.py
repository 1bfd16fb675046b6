"""Figures for people to read. What is not known, or is no number, is a dash."""

import math
from datetime import datetime, timezone
from typing import TypeGuard

from latentforge.runtime.image import MAX_PSNR
from latentforge.runtime.text import size_text

__all__ = [
    "DASH",
    "decibels",
    "figure",
    "joules",
    "known",
    "moment",
    "seconds",
    "share",
    "size",
    "span",
    "times",
]

DASH = "–"


def known(value: float | None) -> TypeGuard[float]:
    """Whether there is a number to show."""
    return value is not None and math.isfinite(value)


def seconds(value: float | None) -> str:
    """Three digits of seconds, or of milliseconds below one."""
    if not known(value):
        return DASH
    return f"{_three(value)} s" if value >= 1 else f"{_three(value * 1e3)} ms"


def size(count: float | None) -> str:
    """Bytes."""
    return size_text(count) if known(count) else DASH


def joules(value: float | None) -> str:
    """Energy."""
    return f"{_three(value)} J" if known(value) else DASH


def times(value: float | None) -> str:
    """How many times faster."""
    return f"{value:.2f}×" if known(value) else DASH


def decibels(value: float | None) -> str:
    """PSNR; equal pictures have none, see image.MAX_PSNR."""
    if not known(value):
        return DASH
    return "identical" if value >= MAX_PSNR else f"{value:.1f} dB"


def share(value: float) -> str:
    """A part of one as a percentage."""
    return f"{value:.1%}" if known(value) else DASH


def figure(value: float | None, unit: str = "") -> str:
    """Four digits of anything."""
    return f"{value:.4g} {unit}".strip() if known(value) else DASH


def moment(date: str) -> str:
    """An ISO 8601 date to the minute; anything else as it is."""
    try:
        when = datetime.fromisoformat(date).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return date
    return f"{when:%Y-%m-%d %H:%M} UTC"


def span(low: float, high: float) -> str:
    """Two times, with the unit once where they share it."""
    first, last = seconds(low), seconds(high)
    number, _, unit = first.partition(" ")
    return f"{number}–{last}" if last.endswith(f" {unit}") else f"{first} – {last}"


def _three(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
