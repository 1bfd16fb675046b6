"""Scaling curves: time and memory by batch and by size, a line a participant."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from latentforge.measure.report import words
from latentforge.measure.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    TOP,
    Chart,
    Line,
    extent,
    spaced,
    tick_row,
)
from latentforge.measure.report.scales import Scale, ticks
from latentforge.measure.results import Point, Results

__all__ = ["COLOURS", "curves", "without_points"]

COLOURS = 8
"""That the style sheet has, after the reference's; participants beyond them begin again."""

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """What of a point goes where, and how to say it."""

    title: str
    x_title: str
    x: Callable[[Point], float]
    y: Callable[[Point], float | None]
    unit: float
    say: Callable[[float | None], str]


def curves(results: Results) -> list[Chart]:
    """The charts for which there are two places or more to join."""
    return [
        chart
        for axes, points in _selections(results.scaling)
        if (chart := _chart(axes, points, _looks(results)))
    ]


def without_points(results: Results) -> list[str]:
    """What could not be measured, in words."""
    return [
        f"{p.name}, batch {p.batch} at {p.width}×{p.height}: {p.message}"
        for p in results.scaling
        if p.message
    ]


def _selections(points: Sequence[Point]) -> Iterator[tuple[_Axes, list[Point]]]:
    """Points that differ in one thing alone, where most of them do."""
    for (height, width), alike in _most(points, lambda p: (p.height, p.width), _batch):
        title = f"Seconds by batch, {width}×{height}"
        yield _times(title, "images a batch", _batch), alike
    for batch, alike in _most(points, _batch, _side):
        yield _times(f"Seconds by size, batch {batch:g}", "pixels a side", _side), alike
        yield _memory(f"Peak memory by size in GB, batch {batch:g}", "pixels a side"), alike


def _times(title: str, x_title: str, x: Callable[[Point], float]) -> _Axes:
    return _Axes(title=title, x_title=x_title, x=x, y=lambda p: p.total, unit=1, say=words.seconds)


def _memory(title: str, x_title: str) -> _Axes:
    return _Axes(
        title=title, x_title=x_title, x=_side, y=lambda p: p.peak_memory, unit=1e9, say=words.size
    )


def _batch(point: Point) -> float:
    return point.batch


def _side(point: Point) -> float:
    return round(math.sqrt(point.height * point.width))


def _most(
    points: Sequence[Point], same: Callable[[Point], T], place: Callable[[Point], float]
) -> list[tuple[T, list[Point]]]:
    """The largest group of points that are the same in one way and differ in another, if any."""
    groups: dict[T, list[Point]] = defaultdict(list)
    for point in points:
        groups[same(point)].append(point)
    best = max(groups.items(), key=lambda g: len({place(p) for p in g[1]}), default=None)
    return [best] if best and len({place(p) for p in best[1]}) > 1 else []


def _looks(results: Results) -> dict[str, tuple[str, int]]:
    """Role and colour by name, the same in every chart."""
    roles = {entry.name: entry.role for entry in results.entries}
    names = dict.fromkeys(point.name for point in results.scaling)
    others = [name for name in names if roles.get(name) != "reference"]
    colours = {name: 1 + index % COLOURS for index, name in enumerate(others)}
    return {name: (roles.get(name, "peer"), colours.get(name, 0)) for name in names}


def _chart(
    axes: _Axes, points: Sequence[Point], looks: Mapping[str, tuple[str, int]]
) -> Chart | None:
    shown = sorted((p for p in points if words.known(axes.y(p))), key=axes.x)
    places = sorted({axes.x(p) for p in shown})
    if len(places) < 2:
        return None
    right = 440 - 14 - max(extent(point.name) for point in shown)
    x = Scale(low=places[0], high=places[-1], start=LEFT + 8, end=right - 8, logarithmic=True)
    top = max((axes.y(p) or 0) / axes.unit for p in shown) or 1.0
    y = Scale(low=0, high=top * 1.05, start=HEIGHT - BOTTOM, end=TOP)
    return Chart(
        title=axes.title,
        x_title=axes.x_title,
        right=right,
        x_ticks=tick_row(x, places),
        y_ticks=tick_row(y, ticks(0, top * 1.05)),
        lines=tuple(_lines(axes, shown, x, y, looks)),
    )


def _lines(
    axes: _Axes, points: Sequence[Point], x: Scale, y: Scale, looks: Mapping[str, tuple[str, int]]
) -> Iterator[Line]:
    by_name: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_name[point.name].append(point)
    ends = [y((axes.y(own[-1]) or 0) / axes.unit) + 4 for own in by_name.values()]
    labels = spaced(ends, low=TOP + 4, high=HEIGHT - BOTTOM)
    for (name, own), label_y in zip(by_name.items(), labels, strict=True):
        role, colour = looks[name]
        yield Line(
            name=name,
            role=role,
            colour=colour,
            places=tuple((x(axes.x(p)), y((axes.y(p) or 0) / axes.unit)) for p in own),
            tips=tuple(f"{name}, {axes.x(p):g} {axes.x_title}: {axes.say(axes.y(p))}" for p in own),
            label_y=label_y,
        )
