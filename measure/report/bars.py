"""Bar chart of image times, split by stage, in percent of the longest bar."""

from collections.abc import Iterator
from dataclasses import dataclass

from latentforge.measure import formatting
from latentforge.measure.conclusion import bounds
from latentforge.measure.formatting import is_number
from latentforge.measure.report.tables import participant_tables
from latentforge.measure.results import BenchResult, Results

__all__ = ["STAGES", "Bar", "BarGroup", "BarSegment", "bars"]

STAGES = ("text encoder", "denoiser", "VAE", "other", "not split")

_STAGE_KEYS = {"text encoder": "text_encoder", "denoiser": "denoiser", "VAE": "vae"}


@dataclass(frozen=True, kw_only=True)
class BarSegment:
    """Stage of a bar; ``start`` and ``width`` are percent of the drawing's width."""

    stage: str
    start: float
    width: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Bar of one participant.

    Attributes:
        whisker: the bar's end at both bounds of the speedup's interval.
        level: confidence level of the whisker, in words; empty without one.
    """

    name: str
    role: str
    seconds: float
    speedup: str
    segments: tuple[BarSegment, ...]
    whisker: tuple[float, float] | None
    level: str

    @property
    def end(self) -> float:
        """End of the last segment."""
        return self.segments[-1].start + self.segments[-1].width


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    """Bars of one class; all groups of a page section share one scale."""

    title: str
    bars: tuple[Bar, ...]


def bars(results: Results) -> list[BarGroup]:
    """Return a bar for every participant with a time, in the order of the tables."""
    entries = {e.name: e for e in results.entries if is_number(e.median.get("total"))}
    longest = max((_extent(entry) for entry in entries.values()), default=0)
    if not longest > 0:
        return []
    groups = []
    for table in participant_tables(results):
        timed = [entries[row.name] for row in table.rows if row.name in entries]
        drawn = tuple(_bar(entry, 100 / longest) for entry in timed)
        groups.append(BarGroup(title=table.title, bars=drawn))
    return [group for group in groups if group.bars]


def _bar(entry: BenchResult, scale: float) -> Bar:
    speedup = entry.ratio.get("total")
    ends = _whisker(entry)
    compared = entry.role != "reference" and speedup is not None
    return Bar(
        name=entry.name,
        role=entry.role,
        seconds=entry.median["total"],
        speedup=formatting.speedup(speedup.value) if compared and speedup else "",
        segments=tuple(_segments(entry, scale)),
        whisker=ends and (ends[0] * scale, ends[1] * scale),
        level=formatting.level(speedup.level) if ends and speedup and speedup.level else "",
    )


def _segments(entry: BenchResult, scale: float) -> Iterator[BarSegment]:
    start = 0.0
    for stage, seconds in _stage_seconds(entry).items():
        yield BarSegment(stage=stage, start=start, width=seconds * scale, seconds=seconds)
        start += seconds * scale


def _stage_seconds(entry: BenchResult) -> dict[str, float]:
    """Return seconds by kind of stage, which add up to the median of the whole request.

    Medians of stages need not add up to it; a sum above it is scaled down.
    """
    total = entry.median["total"]
    stages = {stage: _sum(entry, prefix) for stage, prefix in _STAGE_KEYS.items()}
    timed = sum(stages.values())
    if timed <= 0:
        return {"not split": total}
    scaled = {stage: value * min(1, total / timed) for stage, value in stages.items()}
    parts = {**scaled, "other": max(0.0, total - timed)}
    return {stage: value for stage, value in parts.items() if value > 0}


def _sum(entry: BenchResult, prefix: str) -> float:
    """Sum the stages with a prefix; ``denoiser step`` is a part of another stage."""
    return sum(
        value for name, value in entry.median.items() if name.startswith(prefix) and " " not in name
    )


def _whisker(entry: BenchResult) -> tuple[float, float] | None:
    """Return the seconds at both bounds of the speedup's interval, shorter time first."""
    speedup = entry.ratio.get("total")
    ends = bounds(speedup) if speedup is not None and entry.role != "reference" else None
    if speedup is None or ends is None or not (ends[0] > 0 and speedup.value > 0):
        return None
    seconds = entry.median["total"] * speedup.value
    return seconds / ends[1], seconds / ends[0]


def _extent(entry: BenchResult) -> float:
    ends = _whisker(entry)
    return max(entry.median["total"], ends[1] if ends else 0)
