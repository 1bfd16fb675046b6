"""Scatter plots of quality against speed, with the Pareto front."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from latentforge.measure import formatting
from latentforge.measure.formatting import is_number
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
    label_width,
    tick_row,
)
from latentforge.measure.report.scales import Scale, padded_range, ticks
from latentforge.measure.results import BenchResult, Metric, Results

__all__ = ["label_boxes", "pareto", "scatters", "stairs"]

_CAP = 80.0  # dB, beyond which no difference is visible
_RIGHT = WIDTH - 12


@dataclass(frozen=True, kw_only=True)
class _Quality:
    """Values of one metric by participant."""

    title: str
    unit: str
    lower_is_better: bool
    values: Mapping[str, float]


def scatters(results: Results, metrics: Sequence[Metric]) -> list[Chart]:
    """Return a chart per metric that two or more timed participants have; else one of PSNR.

    Args:
        results: the times.
        metrics: of these results or others; a metric's subject is a participant's name.
    """
    timed = [e for e in results.entries if e.status == "ok" and is_number(e.median.get("total"))]
    names = {entry.name for entry in timed}
    qualities = [*_qualities(metrics, names)] or [_psnr_quality(timed)]
    return [_chart(quality, timed) for quality in qualities if len(quality.values) > 1]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the (cost, quality) points that no other dominates, by cost.

    A point dominates another if it is no worse in both and better in one.
    """
    front = [
        index
        for index, (cost, quality) in enumerate(points)
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
    ]
    return sorted(front, key=lambda index: points[index])


def _qualities(metrics: Sequence[Metric], names: set[str]) -> Iterator[_Quality]:
    kinds = dict.fromkeys((m.name, m.reference, m.network) for m in metrics)
    for kind in kinds:
        alike = [m for m in metrics if (m.name, m.reference, m.network) == kind]
        values = {m.subject: m.value for m in alike if m.subject in names and is_number(m.value)}
        if len(set(values.values())) > 1:  # equal values need no chart
            name, reference, network = kind
            compared = f" to {reference}" if reference else ""
            yield _Quality(
                title=name + compared + (network and f", {network}"),
                unit=alike[0].unit,
                lower_is_better=alike[0].better == "lower",
                values=values,
            )


def _psnr_quality(entries: Sequence[BenchResult]) -> _Quality:
    """Return the PSNR to the reference, which itself stands at the cap."""
    psnr = {e.name: _CAP if e.role == "reference" else e.psnr for e in entries}
    values = {name: min(value, _CAP) for name, value in psnr.items() if is_number(value)}
    title = f"PSNR to the reference, capped at {_CAP:g} dB (no visible difference)"
    return _Quality(title=title, unit="dB", lower_is_better=False, values=values)


def _chart(quality: _Quality, timed: Sequence[BenchResult]) -> Chart:
    shown = [entry for entry in timed if entry.name in quality.values]
    low, high = padded_range([quality.values[e.name] for e in shown])
    y = Scale(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP)
    if quality.lower_is_better:
        y = Scale(low=low, high=high, start=TOP, end=HEIGHT - BOTTOM)
    longest = max(entry.median["total"] for entry in shown) * 1.08 or 1.0
    x = Scale(low=0, high=longest, start=LEFT, end=_RIGHT)
    sign = -1 if quality.lower_is_better else 1
    best = pareto([(e.median["total"], sign * quality.values[e.name]) for e in shown])
    points = [(x(e.median["total"]), y(quality.values[e.name])) for e in shown]
    return Chart(
        title=quality.title,
        x_title="seconds per image",
        right=_RIGHT,
        x_ticks=tick_row(x, ticks(0, longest)),
        y_ticks=tick_row(y, ticks(low, high)),
        dots=tuple(_dots(quality, shown, points, set(best))),
        front=tuple(stairs([points[index] for index in best])),
    )


def stairs(corners: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the Pareto front as steps: each point's quality holds up to the next point's time."""
    for corner, following in zip(corners, [*corners[1:], None], strict=True):
        yield corner
        yield (following[0] if following else _RIGHT, corner[1])


def _dots(
    quality: _Quality,
    entries: Sequence[BenchResult],
    points: Sequence[tuple[float, float]],
    front: set[int],
) -> Iterator[Dot]:
    labels = label_boxes([entry.name for entry in entries], points)
    for index, (entry, (x, y)) in enumerate(zip(entries, points, strict=True)):
        value = formatting.number(quality.values[entry.name], quality.unit)
        yield Dot(
            name=entry.name,
            role=entry.role,
            different_image=entry.speed_class == "B",
            on_front=index in front,
            x=x,
            y=y,
            tip=f"{entry.name}: {formatting.seconds(entry.median['total'])}, {value}",
            label_x=labels[index].left,
            lead_x=min(max(x, labels[index].left), labels[index].right),
            label_y=labels[index].bottom - 3,
        )


def label_boxes(names: Sequence[str], points: Sequence[tuple[float, float]]) -> list[Box]:
    """Place a label near each point, without overlap with points and labels if possible."""
    occupied = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    labels = []
    for name, (x, y) in zip(names, points, strict=True):
        width = label_width(name)
        boxes = [box for box in _candidate_boxes(width, x, y) if _inside(box)]
        free = (box for box in boxes if not any(box.overlaps(other) for other in occupied))
        label = next(free, boxes[0] if boxes else Box(LEFT, y - 7, LEFT + width, y + 7))
        occupied.append(label)
        labels.append(label)
    return labels


def _candidate_boxes(width: float, x: float, y: float) -> Iterator[Box]:
    """Yield label positions: beside the point, then above and below it, ever further away."""
    for lines in (0, *(line for far in range(1, 9) for line in (-far, far))):
        middle = y + lines * GAP
        for left in (x + 8, x - 8 - width, x - width / 2) if lines else (x + 8, x - 8 - width):
            yield Box(left, middle - GAP / 2, left + width, middle + GAP / 2)


def _inside(box: Box) -> bool:
    return (
        box.left >= LEFT and box.right <= WIDTH and box.top >= 0 and box.bottom <= HEIGHT - BOTTOM
    )
