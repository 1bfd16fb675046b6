"""Page of a search: error against latency, the models beside what was measured, and a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from PIL import Image

from latentforge.measure import formatting
from latentforge.measure.pictures import data_url
from latentforge.measure.report.charts import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Chart, Dot, tick_row
from latentforge.measure.report.page import FRAME, environment
from latentforge.measure.report.scales import Scale, Tick, ticks
from latentforge.measure.report.scatter import label_boxes, pareto, stairs
from latentforge.measure.results import ConfidenceInterval
from latentforge.runtime.image import to_array
from latentforge.train.search.search_record import ModelCheck, SearchPoint, SearchRecord

__all__ = ["render_search"]

_RIGHT = WIDTH - 12
_ROLES = {"teacher": "reference", "chosen": "engines", "searched": "engines", "baseline": "peer"}
_SHOWN = 6  # images of a structure
_SHORTEST = 1e-3  # of errors relative to the largest, as a logarithm has no zero


def render_search(record: SearchRecord, images: Mapping[str, Sequence[Image.Image]]) -> str:
    """Return one self-contained HTML page of a search.

    Args:
        record: of the search.
        images: by name of the structure, of equal prompts and seeds.

    Raises:
        ResultsError: Jinja2 is not installed.
    """
    template = environment(__package__).get_template("page.j2")
    checks = [("Sums of scores against true errors", record.errors, 1.0, True)]
    if record.latency is not None:
        title = "Predicted against measured milliseconds of a step"
        checks.insert(0, (title, record.latency, 1e3, False))
    return template.render(
        record=record,
        frame=FRAME,
        fronts=[_front_chart(record)],
        checks=[(_check_chart(title, c, unit, log), c.note) for title, c, unit, log in checks],
        rows=list(_rows(record)),
        matches=list(_matches(record)),
        strips=[(name, _urls(own)) for name, own in images.items()],
    )


def _front_chart(record: SearchRecord) -> Chart:
    """Return error, on a logarithmic scale, against the seconds of a step."""
    shown = [p for p in record.points if math.isfinite(p.error) and _seconds(p) > 0]
    largest = max((p.error for p in shown), default=0.0) or 1.0
    seconds = [_seconds(p) * 1e3 for p in shown]
    floor = min((p.error for p in shown if p.error > 0), default=largest) / 2
    errors = [max(p.error, floor, largest * _SHORTEST**2) for p in shown]
    x = Scale(low=0, high=max(seconds) * 1.08, start=LEFT, end=_RIGHT)
    y = Scale(
        low=min(errors) / 1.3,
        high=max(errors) * 5,  # space for labels of baselines, which lie at the top
        start=HEIGHT - BOTTOM,
        end=TOP,
        logarithmic=True,
    )
    places = [(x(s), y(e)) for s, e in zip(seconds, errors, strict=True)]
    best = pareto([(s, -e) for s, e in zip(seconds, errors, strict=True)])
    return Chart(
        title="Relative squared error of the guided prediction, without training",
        x_title="milliseconds of a step",
        right=_RIGHT,
        x_ticks=tick_row(x, ticks(0, x.high)),
        y_ticks=_powers(y),
        dots=tuple(_dots(shown, places, set(best))),
        front=tuple(stairs([places[index] for index in best])),
    )


def _dots(
    points: Sequence[SearchPoint], places: Sequence[tuple[float, float]], front: set[int]
) -> Iterator[Dot]:
    labels = label_boxes([p.name for p in points], places)
    for index, (point, (x, y), box) in enumerate(zip(points, places, labels, strict=True)):
        yield Dot(
            name=point.name,
            role=_ROLES[point.kind],
            different_image=point.kind == "searched",
            on_front=index in front,
            x=x,
            y=y,
            tip=f"{point.name}: {formatting.seconds(_seconds(point))}, error {point.error:.3g}",
            label_x=box.left,
            lead_x=min(max(x, box.left), box.right),
            label_y=box.bottom - 3,
        )


def _seconds(point: SearchPoint) -> float:
    """Return the measured seconds of a step; 0 if they were not measured."""
    return point.measured or 0.0


def _check_chart(title: str, check: ModelCheck, unit: float, logarithmic: bool) -> Chart:
    """Return predictions by measured values, with the line on which both are equal."""
    usable = [p for p in check.points if all(map(math.isfinite, p)) and min(p) > 0]
    pairs = [(predicted * unit, measured * unit) for predicted, measured in usable] or [(1.0, 1.0)]
    values = [value for pair in pairs for value in pair]
    low, high = (min(values) / 1.3, max(values) * 1.3) if logarithmic else (0, max(values) * 1.08)
    x = Scale(low=low, high=high, start=LEFT, end=_RIGHT, logarithmic=logarithmic)
    y = Scale(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP, logarithmic=logarithmic)
    marks = _powers if logarithmic else _even
    return Chart(
        title=title,
        x_title="measured",
        right=_RIGHT,
        x_ticks=marks(x),
        y_ticks=marks(y),
        dots=tuple(_unnamed(x(m), y(p), f"{p:.3g} for {m:.3g}") for p, m in pairs),
        front=((x(low), y(low)), (x(high), y(high))),
    )


def _unnamed(x: float, y: float, tip: str) -> Dot:
    return Dot(
        name="",
        role="engines",
        different_image=False,
        on_front=False,
        x=x,
        y=y,
        tip=tip,
        label_x=x,
        lead_x=x + 4,
        label_y=y + 4,
    )


def _even(scale: Scale) -> tuple[Tick, ...]:
    return tick_row(scale, ticks(scale.low, scale.high))


def _powers(scale: Scale) -> tuple[Tick, ...]:
    """Return ticks at 1, 2 and 5 times the powers of ten within a logarithmic scale."""
    powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    values = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    inside = [value for value in values if scale.low <= value <= scale.high]
    return tick_row(scale, [v for v in inside if f"{v:e}"[0] == "1"] if len(inside) > 8 else inside)


def _urls(images: Sequence[Image.Image]) -> list[str]:
    """Return the first images as data URLs."""
    return [data_url(array) for array in to_array(list(images[:_SHOWN]))]


def _matches(record: SearchRecord) -> Iterator[list[str]]:
    """Yield the cells of each comparison at equal measured latency."""
    points = {point.name: point for point in record.points}
    for match in record.matches:
        theirs, ours = points[match.baseline], points[match.searched]
        yield [
            match.baseline,
            formatting.seconds(theirs.measured),
            formatting.number(theirs.error),
            match.searched,
            formatting.seconds(ours.measured),
            formatting.number(ours.error),
            _interval(match.latents, formatting.estimate),
            _interval(match.pixels, formatting.estimate),
        ]


def _interval(interval: ConfidenceInterval | None, text: Callable[[float | None], str]) -> str:
    """Return a value with its interval."""
    if interval is None:
        return formatting.DASH
    if interval.low is None or interval.high is None or interval.low == interval.high:
        return text(interval.value)
    return f"{text(interval.value)} ({text(interval.low)} to {text(interval.high)})"


def _rows(record: SearchRecord) -> Iterator[tuple[str, list[str]]]:
    """Yield role, name and cells of each structure."""
    for point in record.points:
        yield (
            _ROLES[point.kind],
            [
                point.name,
                formatting.seconds(point.cost) if record.latency else formatting.DASH,
                formatting.seconds(point.measured),
                _interval(point.speedup, formatting.speedup),
                formatting.number(point.error),
                _interval(point.latents, formatting.estimate),
                _interval(point.psnr, formatting.decibels),
                f"{point.parameters / 1e6:.4g} M",
            ],
        )
