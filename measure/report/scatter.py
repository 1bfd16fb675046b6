"""Quality against speed, and the front of those that nothing beats in both."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from latentforge.measure.report import words
from latentforge.measure.report.charts import (
    BOTTOM,
    GAP,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    Box,
    Chart,
    Dot,
    extent,
    tick_row,
)
from latentforge.measure.report.scales import Scale, spread, ticks
from latentforge.measure.results import BenchResult, Metric, Results

__all__ = ["pareto", "scatters"]

_CAP = 80.0  # dB, beyond which nobody sees a difference
_RIGHT = WIDTH - 12


@dataclass(frozen=True, kw_only=True)
class _Quality:
    """One metric by participant."""

    title: str
    unit: str
    lower_is_better: bool
    values: Mapping[str, float]


def scatters(results: Results, metrics: Sequence[Metric]) -> list[Chart]:
    """A chart for every metric that two participants with a time have; else one of PSNR.

    Args:
        results: whose entries have the times.
        metrics: of these results or others; a metric's subject is an entry's name.
    """
    timed = [e for e in results.entries if e.status == "ok" and words.known(e.median.get("total"))]
    names = {entry.name for entry in timed}
    qualities = [*_measured(metrics, names)] or [_closeness(timed)]
    return [_chart(quality, timed) for quality in qualities if len(quality.values) > 1]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, quality) that no other equals in both and beats in one, by cost."""
    front = [
        index
        for index, (cost, quality) in enumerate(points)
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
    ]
    return sorted(front, key=lambda index: points[index])


def _measured(metrics: Sequence[Metric], names: set[str]) -> Iterator[_Quality]:
    kinds = dict.fromkeys((m.name, m.reference, m.network) for m in metrics)
    for kind in kinds:
        alike = [m for m in metrics if (m.name, m.reference, m.network) == kind]
        values = {m.subject: m.value for m in alike if m.subject in names and words.known(m.value)}
        if len(set(values.values())) > 1:  # equal ones say nothing
            name, reference, network = kind
            yield _Quality(
                title=name
                + (f" to {reference}" if reference else "")
                + (network and f", {network}"),
                unit=alike[0].unit,
                lower_is_better=alike[0].better == "lower",
                values=values,
            )


def _closeness(entries: Sequence[BenchResult]) -> _Quality:
    """PSNR to the reference, whose own is the cap."""
    found = {e.name: _CAP if e.role == "reference" else e.psnr for e in entries}
    values = {name: min(value, _CAP) for name, value in found.items() if words.known(value)}
    title = f"PSNR to the reference, {_CAP:g} dB where no one sees a difference"
    return _Quality(title=title, unit="dB", lower_is_better=False, values=values)


def _chart(quality: _Quality, timed: Sequence[BenchResult]) -> Chart:
    shown = [entry for entry in timed if entry.name in quality.values]
    low, high = spread([quality.values[e.name] for e in shown])
    y = Scale(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP)
    if quality.lower_is_better:
        y = Scale(low=low, high=high, start=TOP, end=HEIGHT - BOTTOM)
    longest = max(entry.median["total"] for entry in shown) * 1.08 or 1.0
    x = Scale(low=0, high=longest, start=LEFT, end=_RIGHT)
    sign = -1 if quality.lower_is_better else 1
    best = pareto([(e.median["total"], sign * quality.values[e.name]) for e in shown])
    places = [(x(e.median["total"]), y(quality.values[e.name])) for e in shown]
    return Chart(
        title=quality.title,
        x_title="seconds an image",
        right=_RIGHT,
        x_ticks=tick_row(x, ticks(0, longest)),
        y_ticks=tick_row(y, ticks(low, high)),
        dots=tuple(_dots(quality, shown, places, set(best))),
        front=tuple(_stairs([places[index] for index in best])),
    )


def _stairs(corners: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """What can be had: up to the next better point, quality is that of the last one."""
    for here, following in zip(corners, [*corners[1:], None], strict=True):
        yield here
        yield (following[0] if following else _RIGHT, here[1])


def _dots(
    quality: _Quality,
    entries: Sequence[BenchResult],
    places: Sequence[tuple[float, float]],
    front: set[int],
) -> Iterator[Dot]:
    labels = _labels([entry.name for entry in entries], places)
    for index, (entry, (x, y)) in enumerate(zip(entries, places, strict=True)):
        value = words.figure(quality.values[entry.name], quality.unit)
        yield Dot(
            name=entry.name,
            role=entry.role,
            other_picture=entry.speed_class == "B",
            on_front=index in front,
            x=x,
            y=y,
            tip=f"{entry.name}: {words.seconds(entry.median['total'])}, {value}",
            label_x=labels[index].left,
            lead_x=min(max(x, labels[index].left), labels[index].right),
            label_y=labels[index].bottom - 3,
        )


def _labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[Box]:
    """A place for every label beside its point, clear of points and other labels if it can be."""
    taken = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    labels = []
    for name, (x, y) in zip(names, places, strict=True):
        options = [box for box in _around(extent(name), x, y) if _inside(box)]
        free = (box for box in options if not any(box.meets(other) for other in taken))
        label = next(free, options[0] if options else Box(LEFT, y - 7, LEFT + extent(name), y + 7))
        taken.append(label)
        labels.append(label)
    return labels


def _around(width: float, x: float, y: float) -> Iterator[Box]:
    """Beside the point, then over and under it, then ever further off."""
    for lines in (0, -1, 1, -2, 2, -3, 3, -4, 4):
        middle = y + lines * GAP
        for left in (x + 8, x - 8 - width, x - width / 2) if lines else (x + 8, x - 8 - width):
            yield Box(left, middle - GAP / 2, left + width, middle + GAP / 2)


def _inside(box: Box) -> bool:
    return (
        box.left >= LEFT and box.right <= WIDTH and box.top >= 0 and box.bottom <= HEIGHT - BOTTOM
    )
