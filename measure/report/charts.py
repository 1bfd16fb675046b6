"""What both kinds of charts are made of: places on a drawing, 440 by 300 units, and labels."""

from collections.abc import Sequence
from dataclasses import dataclass

from latentforge.measure.report.scales import Scale, Tick

__all__ = [
    "BOTTOM",
    "GAP",
    "HEIGHT",
    "LEFT",
    "TOP",
    "WIDTH",
    "Box",
    "Chart",
    "Dot",
    "Line",
    "extent",
    "shortened",
    "spaced",
    "tick_row",
]

WIDTH, HEIGHT = 440.0, 300.0
LEFT, TOP, BOTTOM = 58.0, 14.0, 44.0
GAP = 14.0
"""Between the base lines of labels."""

_LETTER = 8.4  # at 12 units of size, rather too wide than too narrow
_LONGEST = 18


@dataclass(frozen=True, kw_only=True)
class Line:
    """A participant's curve. ``tips`` say its places in words; its label is at its end."""

    name: str
    role: str
    colour: int
    places: tuple[tuple[float, float], ...]
    tips: tuple[str, ...]
    label_y: float


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A participant's point, with the left end of its label's base line, and where it is near."""

    name: str
    role: str
    other_picture: bool
    on_front: bool
    x: float
    y: float
    tip: str
    label_x: float
    lead_x: float
    label_y: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One drawing: ``right`` is where its frame ends, ``front`` the corners of a line."""

    title: str
    x_title: str
    right: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    dots: tuple[Dot, ...] = ()
    front: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Box:
    """What something covers."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Whether the two overlap."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)


def shortened(name: str) -> str:
    """A name that has room in a chart."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def extent(name: str) -> float:
    """Units that a label takes."""
    return _LETTER * len(shortened(name))


def tick_row(scale: Scale, values: Sequence[float]) -> tuple[Tick, ...]:
    """The values with their places."""
    return tuple(Tick(scale(value), f"{value:g}") for value in values)


def spaced(wanted: Sequence[float], *, low: float, high: float, gap: float = GAP) -> list[float]:
    """Places as near as may be to the wanted ones, at least a gap apart, in low..high.

    They keep their order. Where there is no room for so many gaps, gaps shrink.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    places = [0.0] * len(wanted)
    floor = low
    for index in order:
        places[index] = max(wanted[index], floor)
        floor = places[index] + gap
    ceiling = high
    for index in reversed(order):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    return places
