"""Scaling curves: time and memory by batch and by image size, one line per participant."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from latentforge.measure import formatting
from latentforge.measure.formatting import is_number
from latentforge.measure.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    Chart,
    Line,
    label_width,
    spaced,
    tick_row,
)
from latentforge.measure.report.scales import Scale, ticks
from latentforge.measure.results import Point, Results

__all__ = ["COLOURS", "curves", "failed_points"]

COLOURS = 8
"""Colours of the style sheet besides the reference's; further participants reuse them."""

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """Axes of a chart: how to read a point, the unit of y, and its text in tooltips."""

    title: str
    x_title: str
    x: Callable[[Point], float]
    y: Callable[[Point], float | None]
    unit: float
    text: Callable[[float | None], str]


def curves(results: Results) -> list[Chart]:
    """Return the charts that have two or more positions on their x axis."""
    styles = _styles(results)
    return [
        chart
        for axes, points in _selections(results.scaling)
        if (chart := _chart(axes, points, styles))
    ]


def failed_points(results: Results) -> list[str]:
    """Return one line for every point that could not be measured."""
    return [
        f"{p.name}, batch {p.batch} at {p.width}×{p.height}: {p.message}"
        for p in results.scaling
        if p.message
    ]


def _selections(points: Sequence[Point]) -> Iterator[tuple[_Axes, list[Point]]]:
    """Yield the largest sets of points that differ in batch alone, and in size alone."""
    for (height, width), selected in _largest(points, lambda p: (p.height, p.width), _batch):
        title = f"Seconds by batch, {width}×{height}"
        yield _times(title, "images per batch", _batch), selected
    for batch, selected in _largest(points, _batch, _side):
        yield _times(f"Seconds by size, batch {batch:g}", "pixels per side", _side), selected
        yield _memory(f"Peak memory by size in GB, batch {batch:g}", "pixels per side"), selected


def _times(title: str, x_title: str, x: Callable[[Point], float]) -> _Axes:
    return _Axes(
        title=title, x_title=x_title, x=x, y=lambda p: p.total, unit=1, text=formatting.seconds
    )


def _memory(title: str, x_title: str) -> _Axes:
    return _Axes(
        title=title,
        x_title=x_title,
        x=_side,
        y=lambda p: p.peak_memory,
        unit=1e9,
        text=formatting.size,
    )


def _batch(point: Point) -> float:
    return point.batch


def _side(point: Point) -> float:
    return round(math.sqrt(point.height * point.width))


def _largest(
    points: Sequence[Point], same: Callable[[Point], T], place: Callable[[Point], float]
) -> list[tuple[T, list[Point]]]:
    """Return the points with equal ``same`` that have the most different ``place``, if any do."""
    groups: dict[T, list[Point]] = defaultdict(list)
    for point in points:
        groups[same(point)].append(point)
    best = max(groups.items(), key=lambda g: len({place(p) for p in g[1]}), default=None)
    return [best] if best and len({place(p) for p in best[1]}) > 1 else []


def _styles(results: Results) -> dict[str, tuple[str, int]]:
    """Return role and colour by participant, the same in all charts."""
    roles = {entry.name: entry.role for entry in results.entries}
    names = dict.fromkeys(point.name for point in results.scaling)
    coloured = [name for name in names if roles.get(name) != "reference"]
    colours = {name: 1 + index % COLOURS for index, name in enumerate(coloured)}
    return {name: (roles.get(name, "peer"), colours.get(name, 0)) for name in names}


def _chart(
    axes: _Axes, points: Sequence[Point], styles: Mapping[str, tuple[str, int]]
) -> Chart | None:
    shown = sorted((p for p in points if is_number(axes.y(p))), key=axes.x)
    places = sorted({axes.x(p) for p in shown})
    if len(places) < 2:
        return None
    right = WIDTH - 14 - max(label_width(point.name) for point in shown)
    x = Scale(low=places[0], high=places[-1], start=LEFT + 8, end=right - 8, logarithmic=True)
    top = max((axes.y(p) or 0) / axes.unit for p in shown) or 1.0
    y = Scale(low=0, high=top * 1.05, start=HEIGHT - BOTTOM, end=TOP)
    return Chart(
        title=axes.title,
        x_title=axes.x_title,
        right=right,
        x_ticks=tick_row(x, places),
        y_ticks=tick_row(y, ticks(0, top * 1.05)),
        lines=tuple(_lines(axes, shown, x, y, styles)),
    )


def _lines(
    axes: _Axes, points: Sequence[Point], x: Scale, y: Scale, styles: Mapping[str, tuple[str, int]]
) -> Iterator[Line]:
    by_name: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_name[point.name].append(point)
    ends = [y((axes.y(own[-1]) or 0) / axes.unit) + 4 for own in by_name.values()]
    labels = spaced(ends, low=TOP + 4, high=HEIGHT - BOTTOM)
    for (name, own), label_y in zip(by_name.items(), labels, strict=True):
        role, colour = styles[name]
        yield Line(
            name=name,
            role=role,
            colour=colour,
            points=tuple((x(axes.x(p)), y((axes.y(p) or 0) / axes.unit)) for p in own),
            tips=tuple(
                f"{name}, {axes.x(p):g} {axes.x_title}: {axes.text(axes.y(p))}" for p in own
            ),
            label_y=label_y,
        )
