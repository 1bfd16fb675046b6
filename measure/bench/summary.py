"""Benchmark results as text for a terminal."""

from collections.abc import Callable, Iterator, Sequence

from latentforge.measure import formatting
from latentforge.measure.conclusion import interval_text, runs_caveat, warning
from latentforge.measure.results import BenchResult, ConfidenceInterval, Results

__all__ = ["speedup_text", "summary"]

_NAME_WIDTH = 24


def summary(results: Results) -> str:
    """Return one table per class of the participants that ran, and a line for each other one."""
    return "\n".join(_lines(results))


def speedup_text(speedup: ConfidenceInterval) -> str:
    """Return a speedup with its interval and a warning where one is due."""
    interval, caution = interval_text(speedup), warning(speedup)
    text = f"{speedup.value:.2f}x" + (f" ({interval})" if interval else "")
    return f"{text}: {caution}" if caution else text


def _lines(results: Results) -> Iterator[str]:
    ran = [entry for entry in results.entries if entry.status == "ok"]
    reference = results.reference.name if results.reference else ""
    same, different = "class A: same image", "class B: different image"
    yield from _table(same, [e for e in ran if e.speed_class != "B"], reference)
    yield from _table(different, [e for e in ran if e.speed_class == "B"], reference)
    if caveat := runs_caveat(results):
        yield f"speedups: {caveat}"
    for entry in results.entries:
        if entry.status != "ok":
            yield f"{entry.name}: {entry.status}: {entry.message}"


def _table(title: str, entries: Sequence[BenchResult], reference: str) -> Iterator[str]:
    if not entries:
        return
    heads = "".join(f"{name:>12}" for name in _COLUMNS)
    yield f"{title:<{_NAME_WIDTH}}{heads}  speedup over {reference}".rstrip()
    for entry in entries:
        cells = "".join(f"{cell(entry):>12}" for cell in _COLUMNS.values())
        compared = entry.role != "reference" and "total" in entry.ratio
        speedup = speedup_text(entry.ratio["total"]) if compared else ""
        yield f"{entry.name[: _NAME_WIDTH - 1]:<{_NAME_WIDTH}}{cells}  {speedup}".rstrip()
    yield ""


def _psnr(entry: BenchResult) -> str:
    return "reference" if entry.role == "reference" else _text(entry.psnr, formatting.decibels)


def _seconds(value: float | None) -> str:
    return _text(value, formatting.seconds)


def _bytes(value: float | None) -> str:
    return _text(value, formatting.size)


def _text(value: float | None, text: Callable[[float | None], str]) -> str:
    return "" if value is None else text(value)


_COLUMNS: dict[str, Callable[[BenchResult], str]] = {
    "runs on": lambda entry: entry.placement,
    "image": lambda entry: _seconds(entry.median.get("total")),
    "step": lambda entry: _seconds(entry.median.get("denoiser step")),
    "first image": lambda entry: _seconds(entry.first.seconds["total"] if entry.first else None),
    "load": lambda entry: _seconds(min(entry.ready_seconds, default=None)),
    "memory": lambda entry: _bytes(entry.peak_memory),
    "files": lambda entry: _bytes(entry.file_bytes),
    "PSNR": _psnr,
}
