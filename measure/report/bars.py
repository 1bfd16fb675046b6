"""Image times as bars, stage by stage, in percent of the longest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from latentforge.measure.report import words
from latentforge.measure.report.conclusion import bounds
from latentforge.measure.report.tables import participant_tables
from latentforge.measure.results import BenchResult, Results

__all__ = ["STAGES", "Bar", "Group", "Segment", "bars"]

STAGES = ("text encoder", "UNet", "VAE", "rest", "not split")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One stage of one bar; places in percent of the drawing's width."""

    stage: str
    start: float
    width: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One participant. ``whisker`` is its time at both ends of its ratio's interval."""

    name: str
    role: str
    seconds: float
    ratio: str
    segments: tuple[Segment, ...]
    whisker: tuple[float, float] | None

    @property
    def end(self) -> float:
        """Where the last segment ends."""
        return self.segments[-1].start + self.segments[-1].width


@dataclass(frozen=True, kw_only=True)
class Group:
    """Bars of one class; all groups have one scale."""

    title: str
    bars: tuple[Bar, ...]


def bars(results: Results) -> list[Group]:
    """A bar for every participant that has a time, in the order of the tables."""
    entries = {e.name: e for e in results.entries if words.known(e.median.get("total"))}
    longest = max((_reach(entry) for entry in entries.values()), default=0)
    if not longest > 0:
        return []
    groups = []
    for table in participant_tables(results):
        kept = [entries[row.name] for row in table.rows if row.name in entries]
        drawn = tuple(_bar(entry, 100 / longest) for entry in kept)
        groups.append(Group(title=table.title, bars=drawn))
    return [group for group in groups if group.bars]


def _bar(entry: BenchResult, scale: float) -> Bar:
    ratio = entry.ratio.get("total")
    ends = _whisker(entry)
    return Bar(
        name=entry.name,
        role=entry.role,
        seconds=entry.median["total"],
        ratio="" if entry.role == "reference" or ratio is None else words.times(ratio.value),
        segments=tuple(_segments(entry, scale)),
        whisker=ends and (ends[0] * scale, ends[1] * scale),
    )


def _segments(entry: BenchResult, scale: float) -> Iterator[Segment]:
    start = 0.0
    for stage, seconds in _split(entry).items():
        yield Segment(stage=stage, start=start, width=seconds * scale, seconds=seconds)
        start += seconds * scale


def _split(entry: BenchResult) -> dict[str, float]:
    """Seconds by kind of stage. Medians of stages need not add up to that of the whole, so what
    is above it shrinks them alike."""
    total = entry.median["total"]
    found = {
        stage: _sum(entry, prefix)
        for stage, prefix in (
            ("text encoder", "text_encoder"),
            ("UNet", "denoiser"),
            ("VAE", "vae"),
        )
    }
    known = sum(found.values())
    if known <= 0:
        return {"not split": total}
    shrunk = {stage: value * min(1, total / known) for stage, value in found.items()}
    parts = {**shrunk, "rest": max(0.0, total - known)}
    return {stage: value for stage, value in parts.items() if value > 0}


def _sum(entry: BenchResult, prefix: str) -> float:
    stages: Sequence[str] = [name for name in entry.median if name.startswith(prefix)]
    return sum(
        entry.median[name] for name in stages if " " not in name
    )  # "denoiser step" is a part


def _whisker(entry: BenchResult) -> tuple[float, float] | None:
    ratio = entry.ratio.get("total")
    ends = bounds(ratio) if ratio is not None and entry.role != "reference" else None
    if ratio is None or ends is None or not (ends[0] > 0 and ratio.value > 0):
        return None
    seconds = entry.median["total"] * ratio.value
    return seconds / ends[1], seconds / ends[0]


def _reach(entry: BenchResult) -> float:
    ends = _whisker(entry)
    return max(entry.median["total"], ends[1] if ends else 0)
