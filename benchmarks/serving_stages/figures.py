"""Figures of a measurement, with the limits that they are held to, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Figure", "as_json", "as_table"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Figure of a measurement.

    Attributes:
        text: its name, in words.
        value: the figure.
        unit: of value and limit.
        limit: value that it may reach; None for one that is only reported.
        at_least: True if the limit is the least value, and not the largest.
    """

    text: str
    value: float
    unit: str = ""
    limit: float | None = None
    at_least: bool = False

    @property
    def is_kept(self) -> bool | None:
        """True if the value keeps the limit; None without one."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def row(self) -> str:
        """Row of the table."""
        sign = "at least" if self.at_least else "at most"
        limit = "" if self.limit is None else f"{sign} {_shown(self.limit)}{self.unit}"
        verdict = {True: "yes", False: "**no**", None: ""}[self.is_kept]
        return f"| {self.text} | {_shown(self.value)}{self.unit} | {limit} | {verdict} |"


def as_table(figures: Sequence[Figure]) -> str:
    """Return figures as a table in Markdown."""
    head = "| figure | measured | limit | kept |\n|---|---:|---:|---|"
    return "\n".join((head, *(figure.row for figure in figures)))


def as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Return figures as JSON has them."""
    return [{**asdict(figure), "kept": figure.is_kept} for figure in figures]


def _shown(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
