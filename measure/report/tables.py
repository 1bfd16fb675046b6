"""Participants and metrics in rows. Same pictures and other pictures never share a table."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentforge.measure.report import words
from latentforge.measure.report.conclusion import bounds, finding, is_wide
from latentforge.measure.results import BenchResult, Metric, Results

__all__ = [
    "Cell",
    "MetricTable",
    "TableRow",
    "Table",
    "participant_tables",
    "metric_tables",
    "without_figures",
]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure, what is known of its spread, and a warning in words."""

    text: str
    detail: str = ""
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One participant: its name, what it is made of, and a cell a column."""

    name: str
    role: str
    detail: str
    versions: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Participants that may be compared with each other."""

    title: str
    lead: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True, kw_only=True)
class MetricTable:
    """One metric, taken in one way, by whose pictures it is of."""

    name: str
    better: str
    how: str
    note: str
    metrics: tuple[Metric, ...]


def participant_tables(results: Results) -> list[Table]:
    """Class A with the reference, class B, and what has no picture to tell its class by."""
    ran = [entry for entry in results.entries if entry.status == "ok"]
    reference = [entry for entry in ran if entry.role == "reference"]
    others = [entry for entry in ran if entry.role != "reference"]
    by_class = {kind: [e for e in others if e.speed_class == kind] for kind in ("A", "B", None)}
    name = reference[0].name if reference else "the reference"
    if not (reference or by_class["A"] or by_class["B"]):
        return [_table("Times", "Nothing to compare pictures with.", by_class[None])] * bool(ran)
    same = f"At equal seed these make the picture that {name} makes; PSNR says how closely."
    other = f"These make another picture than {name}: what they gain in time may cost quality."
    none = "No picture of these could be compared, so nothing says that they do the same work."
    tables = [
        _table("Same picture (class A)", same, [*reference, *by_class["A"]]),
        _table("Another picture (class B)", other, by_class["B"]),
        _table("Picture not compared", none, by_class[None]),
    ]
    return [table for table in tables if table.rows]


def without_figures(results: Results) -> list[BenchResult]:
    """Those that failed or aren't installed."""
    return [entry for entry in results.entries if entry.status != "ok"]


def metric_tables(metrics: Sequence[Metric]) -> list[MetricTable]:
    """Figures that may be compared with each other, and the caveat that they share."""
    groups: dict[tuple[str, ...], list[Metric]] = {}
    for metric in metrics:
        key = (metric.name, metric.better, metric.reference, metric.network)
        groups.setdefault(key, []).append(metric)
    return [
        MetricTable(
            name=name,
            better=better,
            how=", ".join(filter(None, [reference and f"against {reference}", network])),
            note=own[0].note if len({metric.note for metric in own}) == 1 else "",
            metrics=tuple(own),
        )
        for (name, better, reference, network), own in groups.items()
    ]


def _table(title: str, lead: str, entries: Sequence[BenchResult]) -> Table:
    """Fastest first below the reference; columns that no one has a figure for are left out."""
    ranked = sorted(entries, key=lambda e: (e.role != "reference", e.slowness))
    cells = {column: [read(entry) for entry in ranked] for column, read in _COLUMNS.items()}
    shown = [column for column, found in cells.items() if any(cell is not None for cell in found)]
    rows = tuple(
        _row(entry, tuple(cells[column][index] or Cell(text=words.DASH) for column in shown))
        for index, entry in enumerate(ranked)
    )
    return Table(title=title, lead=lead, columns=tuple(shown), rows=rows)


def _row(entry: BenchResult, cells: tuple[Cell, ...]) -> TableRow:
    gate = (entry.gate or "no gate has judged it") if entry.speed_class == "B" else ""
    detail = ", ".join(filter(None, [entry.precision, gate]))
    versions = ", ".join(f"{name} {version}" for name, version in entry.versions.items())
    return TableRow(name=entry.name, role=entry.role, detail=detail, versions=versions, cells=cells)


def _median(entry: BenchResult, stage: str) -> float | None:
    value = entry.median.get(stage)
    return value if words.known(value) else None


def _image(entry: BenchResult) -> Cell | None:
    if (value := _median(entry, "total")) is None:
        return None
    taken = [run.seconds["total"] for run in entry.runs if "total" in run.seconds]
    few = f"{len(taken)} run" if len(taken) == 1 else ""
    span = words.span(min(taken), max(taken)) if len(taken) > 1 else few
    return Cell(text=words.seconds(value), detail=span)


def _ratio(entry: BenchResult) -> Cell | None:
    ratio = entry.ratio.get("total")
    if entry.role == "reference" or ratio is None or not words.known(ratio.value):
        return None
    if (ends := bounds(ratio)) is None:
        return Cell(text=words.times(ratio.value), warning="too few runs to tell")
    warning = "no difference can be told" if finding(ratio) == "even" else ""
    if is_wide(ratio):
        warning = "too wide to conclude"
    span = f"{ends[0]:.2f}–{ends[1]:.2f}"
    return Cell(text=words.times(ratio.value), detail=span, warning=warning)


def _stage(*names: str) -> Callable[[BenchResult], Cell | None]:
    """The sum of the stages of these names that were measured."""

    def read(entry: BenchResult) -> Cell | None:
        found = [value for name in names if (value := _median(entry, name)) is not None]
        return Cell(text=words.seconds(sum(found))) if found else None

    return read


def _first(entry: BenchResult) -> Cell | None:
    value = entry.first.seconds.get("total") if entry.first else None
    return Cell(text=words.seconds(value)) if words.known(value) else None


def _ready(entry: BenchResult) -> Cell | None:
    if not entry.ready_seconds:
        return None
    return Cell(text=words.seconds(statistics.median(entry.ready_seconds)))


def _attribute(
    name: str, say: Callable[[float | None], str]
) -> Callable[[BenchResult], Cell | None]:
    def read(entry: BenchResult) -> Cell | None:
        value = getattr(entry, name)
        return Cell(text=say(value)) if words.known(value) else None

    return read


def _energy(entry: BenchResult) -> Cell | None:
    value = _median(entry, "joules")
    return None if value is None else Cell(text=words.joules(value))


def _psnr(entry: BenchResult) -> Cell | None:
    if entry.role == "reference" or not words.known(entry.psnr):
        return None
    return Cell(text=words.decibels(entry.psnr))


_COLUMNS: dict[str, Callable[[BenchResult], Cell | None]] = {
    "image": _image,
    "times faster": _ratio,
    "PSNR": _psnr,
    "UNet step": _stage("denoiser step"),
    "text encoder": _stage("text_encoder", "text_encoder_2"),
    "VAE decoder": _stage("vae_decoder"),
    "sampler": _stage("sampler"),
    "first image": _first,
    "start to ready": _ready,
    "conversion": _attribute("prepare_seconds", words.seconds),
    "peak memory": _attribute("peak_memory", words.size),
    "device memory": _attribute("device_memory", words.size),
    "files": _attribute("file_bytes", words.size),
    "energy": _energy,
}
