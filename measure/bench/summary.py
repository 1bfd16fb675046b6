"""A benchmark's results as text, for a terminal."""

from collections.abc import Callable, Iterator, Sequence

from latentforge.measure.report.conclusion import bounds, finding, is_wide
from latentforge.measure.results import BenchResult, ConfidenceInterval, Results

__all__ = ["summary", "ratio_text"]

_NAME = 24

_COLUMNS: dict[str, Callable[[BenchResult], str]] = {
    "image": lambda entry: _seconds(entry.median.get("total")),
    "UNet step": lambda entry: _seconds(entry.median.get("denoiser step")),
    "first image": lambda entry: _seconds(entry.first.seconds["total"] if entry.first else None),
    "ready": lambda entry: _seconds(min(entry.ready_seconds, default=None)),
    "memory": lambda entry: _megabytes(entry.peak_memory),
    "files": lambda entry: _megabytes(entry.file_bytes),
    "PSNR": lambda entry: "" if entry.psnr is None else f"{entry.psnr:.1f} dB",
}


def summary(results: Results) -> str:
    """Tables of what ran, same pictures apart from others, and a line for what did not."""
    return "\n".join(_lines(results))


def ratio_text(interval: ConfidenceInterval) -> str:
    """A ratio in words, with what it is worth."""
    value, ends = f"{interval.value:.2f}x", bounds(interval)
    if ends is None:
        return value
    words = f"{value} ({ends[0]:.2f} to {ends[1]:.2f})"
    if finding(interval) == "even":
        return f"{words}: no difference can be told"
    return f"{words}: too wide to conclude how much" if is_wide(interval) else words


def _lines(results: Results) -> Iterator[str]:
    ran = [entry for entry in results.entries if entry.status == "ok"]
    reference = results.reference.name if results.reference else ""
    yield from _table("class A: same picture", [e for e in ran if e.speed_class != "B"], reference)
    yield from _table("class B: another one", [e for e in ran if e.speed_class == "B"], reference)
    for entry in results.entries:
        if entry.status != "ok":
            yield f"{entry.name}: {entry.status}: {entry.message}"


def _table(title: str, entries: Sequence[BenchResult], reference: str) -> Iterator[str]:
    if not entries:
        return
    heads = "".join(f"{name:>12}" for name in _COLUMNS)
    yield f"{title:<{_NAME}}{heads}  faster than {reference}"
    for entry in entries:
        cells = "".join(f"{cell(entry):>12}" for cell in _COLUMNS.values())
        known = entry.name != reference and "total" in entry.ratio
        ratio = ratio_text(entry.ratio["total"]) if known else ""
        yield f"{entry.name[: _NAME - 1]:<{_NAME}}{cells}  {ratio}".rstrip()
    yield ""


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f} MB"
