"""Parts shared by curves and scatter plots: records in drawing units (440 by 300), and labels."""

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
    "label_width",
    "shortened",
    "spaced",
    "tick_row",
]

WIDTH, HEIGHT = 440.0, 300.0
LEFT, TOP, BOTTOM = 58.0, 14.0, 44.0
GAP = 14.0
"""Distance between the base lines of labels."""

_LETTER = 8.4  # width at font size 12, rather an over- than an underestimate
_MAX_LETTERS = 18


@dataclass(frozen=True, kw_only=True)
class Line:
    """Curve of one participant, labelled at its end; ``tips`` are the tooltips of its points."""

    name: str
    role: str
    colour: int
    points: tuple[tuple[float, float], ...]
    tips: tuple[str, ...]
    label_y: float


@dataclass(frozen=True, kw_only=True)
class Dot:
    """Point of one participant in a scatter plot.

    Attributes:
        different_image: True for class B.
        on_front: True if it lies on the Pareto front.
        label_x: left end of the label's base line, at height ``label_y``.
        lead_x: the label's end of the line that connects it with the point.
    """

    name: str
    role: str
    different_image: bool
    on_front: bool
    x: float
    y: float
    tip: str
    label_x: float
    lead_x: float
    label_y: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Chart with curves or points; ``right`` is its plot's right edge, ``front`` a Pareto front."""

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
    """Rectangle in drawing units."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Return True if the interiors of two rectangles intersect."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)


def shortened(name: str) -> str:
    """Return a name cut to a chart label's length."""
    return name if len(name) <= _MAX_LETTERS else f"{name[: _MAX_LETTERS - 1]}…"


def label_width(name: str) -> float:
    """Return the estimated width of a name's label."""
    return _LETTER * len(shortened(name))


def tick_row(scale: Scale, values: Sequence[float]) -> tuple[Tick, ...]:
    """Return tick marks at values of an axis."""
    return tuple(Tick(scale(value), f"{value:g}") for value in values)


def spaced(positions: Sequence[float], *, low: float, high: float, gap: float = GAP) -> list[float]:
    """Move positions apart to at least ``gap`` within low..high, in their order.

    The gap shrinks if there is not enough room.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    moved = [0.0] * len(positions)
    floor = low
    for index in order:
        moved[index] = max(positions[index], floor)
        floor = moved[index] + gap
    ceiling = high
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved
