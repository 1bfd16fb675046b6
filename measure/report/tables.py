"""Tables of participants and of metrics. Classes A and B never share a table."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentforge.measure import formatting
from latentforge.measure.conclusion import interval_text, warning
from latentforge.measure.formatting import is_number
from latentforge.measure.results import BenchResult, Metric, Results

__all__ = [
    "Cell",
    "MetricTable",
    "Table",
    "TableRow",
    "metric_tables",
    "not_measured",
    "participant_tables",
]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Value with its spread and, where one is due, a warning."""

    text: str
    detail: str = ""
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """Participant with one cell per column."""

    name: str
    role: str
    detail: str
    versions: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Participants of one class."""

    title: str
    lead: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True, kw_only=True)
class MetricTable:
    """Values of one metric, computed in one way, by subject.

    Attributes:
        how: the reference and the network of the metric.
        note: the caveat that all values share; empty if they differ.
        levels: confidence levels of the intervals, in words.
    """

    name: str
    better: str
    how: str
    note: str
    levels: str
    metrics: tuple[Metric, ...]


def participant_tables(results: Results) -> list[Table]:
    """Return tables of class A with the reference, of class B, and of images not compared."""
    ran = [entry for entry in results.entries if entry.status == "ok"]
    reference = [entry for entry in ran if entry.role == "reference"]
    candidates = [entry for entry in ran if entry.role != "reference"]
    by_class = {kind: [e for e in candidates if e.speed_class == kind] for kind in ("A", "B", None)}
    name = reference[0].name if reference else "the reference"
    if not (reference or by_class["A"] or by_class["B"]):
        return [_table("Times", "There is no reference image.", by_class[None])] * bool(ran)
    same = f"At equal seeds these generate the image of {name}; PSNR measures how closely."
    different = (
        f"These generate a different image than {name}: speed may come at a cost in quality."
    )
    unknown = "These images could not be compared with the reference's."
    tables = [
        _table("Same image (class A)", same, [*reference, *by_class["A"]]),
        _table("Different image (class B)", different, by_class["B"]),
        _table("Image not compared", unknown, by_class[None]),
    ]
    return [table for table in tables if table.rows]


def not_measured(results: Results) -> list[BenchResult]:
    """Return the participants that failed or are not installed."""
    return [entry for entry in results.entries if entry.status != "ok"]


def metric_tables(metrics: Sequence[Metric]) -> list[MetricTable]:
    """Group metrics whose values are comparable with each other."""
    groups: dict[tuple[str, ...], list[Metric]] = {}
    for metric in metrics:
        key = (metric.name, metric.better, metric.reference, metric.network)
        groups.setdefault(key, []).append(metric)
    return [_metric_table(group) for group in groups.values()]


def _metric_table(group: Sequence[Metric]) -> MetricTable:
    first = group[0]
    levels = sorted({metric.level for metric in group if metric.level is not None})
    how = [first.reference and f"against {first.reference}", first.network]
    return MetricTable(
        name=first.name,
        better=first.better,
        how=", ".join(filter(None, how)),
        note=first.note if len({metric.note for metric in group}) == 1 else "",
        levels=", ".join(map(formatting.level, levels)),
        metrics=tuple(group),
    )


def _table(title: str, lead: str, entries: Sequence[BenchResult]) -> Table:
    """Sort by speed, the reference first; leave out columns without any value."""
    ranked = sorted(entries, key=lambda e: (e.role != "reference", e.relative_time))
    cells = {column: [read(entry) for entry in ranked] for column, read in _COLUMNS.items()}
    shown = [
        column for column, values in cells.items() if any(cell and cell.text for cell in values)
    ]
    dash = Cell(text=formatting.DASH)
    rows = tuple(
        _row(entry, tuple(cells[column][index] or dash for column in shown))
        for index, entry in enumerate(ranked)
    )
    return Table(title=title, lead=lead, columns=tuple(shown), rows=rows)


def _row(entry: BenchResult, cells: tuple[Cell, ...]) -> TableRow:
    gate = (entry.gate or "no quality gate") if entry.speed_class == "B" else ""
    detail = ", ".join(filter(None, [entry.placement, gate]))
    versions = ", ".join(f"{name} {version}" for name, version in entry.versions.items())
    return TableRow(name=entry.name, role=entry.role, detail=detail, versions=versions, cells=cells)


def _median(entry: BenchResult, stage: str) -> float | None:
    value = entry.median.get(stage)
    return value if is_number(value) else None


def _image(entry: BenchResult) -> Cell | None:
    if (value := _median(entry, "total")) is None:
        return None
    seconds = [run.seconds["total"] for run in entry.runs if "total" in run.seconds]
    detail = "1 run" if len(seconds) == 1 else ""
    if len(seconds) > 1:
        detail = formatting.seconds_range(min(seconds), max(seconds))
    return Cell(text=formatting.seconds(value), detail=detail)


def _speedup(entry: BenchResult) -> Cell | None:
    if entry.role == "reference":
        return Cell(text="")
    speedup = entry.ratio.get("total")
    if speedup is None or not is_number(speedup.value):
        return None
    return Cell(
        text=formatting.speedup(speedup.value),
        detail=interval_text(speedup),
        warning=warning(speedup),
    )


def _stages(*names: str) -> Callable[[BenchResult], Cell | None]:
    """Return a column of the sum of the stages with these names that were timed."""

    def read(entry: BenchResult) -> Cell | None:
        values = [value for name in names if (value := _median(entry, name)) is not None]
        return Cell(text=formatting.seconds(sum(values))) if values else None

    return read


def _first(entry: BenchResult) -> Cell | None:
    value = entry.first.seconds.get("total") if entry.first else None
    return Cell(text=formatting.seconds(value)) if is_number(value) else None


def _load(entry: BenchResult) -> Cell | None:
    if not entry.ready_seconds:
        return None
    return Cell(text=formatting.seconds(statistics.median(entry.ready_seconds)))


def _attribute(
    name: str, text: Callable[[float | None], str]
) -> Callable[[BenchResult], Cell | None]:
    """Return a column of an attribute of the results."""

    def read(entry: BenchResult) -> Cell | None:
        value = getattr(entry, name)
        return Cell(text=text(value)) if is_number(value) else None

    return read


def _energy(entry: BenchResult) -> Cell | None:
    value = _median(entry, "joules")
    return None if value is None else Cell(text=formatting.joules(value))


def _psnr(entry: BenchResult) -> Cell | None:
    if entry.role == "reference":
        return Cell(text="")
    return Cell(text=formatting.decibels(entry.psnr)) if is_number(entry.psnr) else None


_COLUMNS: dict[str, Callable[[BenchResult], Cell | None]] = {
    "image": _image,
    "speedup": _speedup,
    "PSNR": _psnr,
    "denoiser step": _stages("denoiser step"),
    "text encoder": _stages("text_encoder", "text_encoder_2"),
    "VAE decoder": _stages("vae_decoder"),
    "sampler": _stages("sampler"),
    "first image": _first,
    "load": _load,
    "conversion": _attribute("prepare_seconds", formatting.seconds),
    "peak memory": _attribute("peak_memory", formatting.size),
    "device memory": _attribute("device_memory", formatting.size),
    "files": _attribute("file_bytes", formatting.size),
    "energy": _energy,
}
