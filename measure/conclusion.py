"""Conclusions from a benchmark: what its speedups support, in sentences."""

import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Literal

from latentforge.measure.formatting import is_number, level, seconds, speedup
from latentforge.measure.results import BenchResult, ConfidenceInterval, Results
from latentforge.measure.statistics import interval_level, paired_speedups

__all__ = [
    "MIN_LEVEL",
    "MIN_RUNS",
    "WIDE",
    "Finding",
    "bounds",
    "finding",
    "interval_text",
    "is_wide",
    "runs_caveat",
    "summary_sentences",
    "too_few_runs",
    "warning",
]

MIN_LEVEL = 0.93
"""Least confidence level of an interval that a conclusion is drawn from."""

MIN_RUNS = next(runs for runs in count(2) if interval_level(runs) >= MIN_LEVEL)
"""Fewest runs whose interval reaches MIN_LEVEL: five, with 93.75 %."""

WIDE = 1.25
"""Ratio of an interval's high to its low bound above which the speedup is not quantified."""

Finding = Literal["faster", "slower", "no difference", "too few runs"]

_IMAGES = {"A": "the same image", "B": "a different image", None: "an image"}


def bounds(interval: ConfidenceInterval) -> tuple[float, float] | None:
    """Return the two ends of an interval, or None unless the value and both ends are finite."""
    if is_number(interval.value) and is_number(interval.low) and is_number(interval.high):
        return interval.low, interval.high
    return None


def finding(interval: ConfidenceInterval) -> Finding:
    """Return what the interval of a speedup supports.

    ``too few runs`` if there is no interval or its level is below MIN_LEVEL; ``no difference`` if
    it contains 1.
    """
    ends = bounds(interval)
    if ends is None or (interval.level or 0) < MIN_LEVEL:
        return "too few runs"
    low, high = ends
    return "faster" if low > 1 else "slower" if high < 1 else "no difference"


def is_wide(interval: ConfidenceInterval) -> bool:
    """Return True if an interval is too wide to quantify a speedup."""
    ends = bounds(interval)
    return ends is not None and (ends[0] <= 0 or ends[1] / ends[0] > WIDE)


def interval_text(interval: ConfidenceInterval) -> str:
    """Return a speedup's bounds with their level, ``1.90–2.10, 95 %``; empty without bounds."""
    ends = bounds(interval)
    if ends is None:
        return ""
    return f"{ends[0]:.2f}–{ends[1]:.2f}, {level(interval.level or 0)}"


def warning(interval: ConfidenceInterval) -> str:
    """Return a short warning about a speedup; empty if its interval supports a conclusion."""
    match finding(interval):
        case "too few runs":
            return "too few runs to conclude"
        case "no difference":
            return "no significant difference"
    return "interval too wide to quantify" if is_wide(interval) else ""


def too_few_runs(interval: ConfidenceInterval, runs: int) -> str:
    """Return why a number of runs supports no conclusion, and how many would."""
    counted = f"{runs} run{'s' * (runs != 1)}"
    interval_level = f"{level(interval.level)} interval, " if interval.level else ""
    return f"{counted}: {interval_level}too few to conclude, run {MIN_RUNS} or more"


def runs_caveat(results: Results) -> str:
    """Return that the speedups of a file are from too few runs; empty if none is."""
    for entry in results.entries:
        speedup = entry.ratio.get("total")
        if entry.role != "reference" and speedup and finding(speedup) == "too few runs":
            return too_few_runs(speedup, len(entry.runs))
    return ""


def summary_sentences(results: Results) -> list[str]:
    """Compare the fastest engines of each class with the reference and the fastest peer."""
    if not results.entries:
        return []
    timed = [e for e in results.entries if e.status == "ok" and is_number(e.median.get("total"))]
    if not timed:
        return ["No participant completed a run."]
    sentences = list(_by_class(results.reference, timed))
    fastest = min(timed, key=_relative_time)
    return sentences or [f"{fastest.name} generates an image in {seconds(_total(fastest))}."]


def _by_class(reference: BenchResult | None, timed: Sequence[BenchResult]) -> Iterator[str]:
    for speed_class, image in _IMAGES.items():
        entries = [entry for entry in timed if entry.speed_class == speed_class]
        engines = [entry for entry in entries if entry.role == "engines"]
        peers = [entry for entry in entries if entry.role == "peer"]
        if engines:
            best = min(engines, key=_relative_time)
            yield _against_reference(best, image, reference)
            if peers and speed_class == "A":  # images of class B differ from each other too
                yield _against_peer(best, min(peers, key=_relative_time))


def _against_reference(best: BenchResult, image: str, reference: BenchResult | None) -> str:
    text = f"{best.name} generates {image} in {seconds(_total(best))}"
    ratio = best.ratio.get("total")
    if reference is None or ratio is None or not is_number(ratio.value):
        return f"{text}."
    return f"{text}: {_comparison('it', ratio, reference.name, len(best.runs))}."


def _against_peer(best: BenchResult, peer: BenchResult) -> str:
    text = f"The fastest peer with the same image, {peer.name}, takes {seconds(_total(peer))}"
    return f"{text}: {_comparison(best.name, _paired(best, peer), peer.name, len(best.runs))}."


def _comparison(subject: str, ratio: ConfidenceInterval, other: str, runs: int) -> str:
    """Return a clause on a speedup; that of a slower participant is inverted."""
    result = finding(ratio)
    if result == "too few runs":
        return f"speedup over {other} {speedup(ratio.value)} ({too_few_runs(ratio, runs)})"
    if result == "no difference":
        return f"no significant difference from {other} (speedup {_interval(ratio)})"
    factor = ratio if result == "faster" else _inverse(ratio)
    if is_wide(ratio):
        return f"{subject} is {result} than {other}, by an uncertain factor ({_interval(factor)})"
    if result == "slower":
        return f"{subject} takes {factor.value:.2f} times as long as {other} ({_interval(factor)})"
    return f"{subject} is {factor.value:.2f} times as fast as {other} ({_interval(factor)})"


def _paired(engines: BenchResult, peer: BenchResult) -> ConfidenceInterval:
    """Return the speedup over a peer, from pairs of runs if both have equally many."""
    if len(engines.runs) == len(peer.runs) > 0:
        speedups = paired_speedups(peer.runs, engines.runs)
        if "total" in speedups:
            return speedups["total"]
    return ConfidenceInterval(value=_total(peer) / max(_total(engines), 1e-9))


def _inverse(ratio: ConfidenceInterval) -> ConfidenceInterval:
    assert ratio.low is not None and ratio.high is not None
    value, low, high = (max(v, 1e-9) for v in (ratio.value, ratio.low, ratio.high))
    return ConfidenceInterval(value=1 / value, low=1 / high, high=1 / low, level=ratio.level)


def _interval(ratio: ConfidenceInterval) -> str:
    return f"{level(ratio.level or 0)} interval {ratio.low:.2f} to {ratio.high:.2f}"


def _relative_time(entry: BenchResult) -> float:
    return entry.relative_time if is_number(entry.relative_time) else math.inf


def _total(entry: BenchResult) -> float:
    return entry.median["total"]
