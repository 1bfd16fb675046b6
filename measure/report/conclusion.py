"""What the figures say, in a sentence or two, and what they don't."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from latentforge.measure.bench.statistics import ratios
from latentforge.measure.report.words import known, seconds
from latentforge.measure.results import BenchResult, ConfidenceInterval, Results

__all__ = ["WIDE", "Finding", "bounds", "finding", "in_short", "is_wide"]

WIDE = 1.25
"""Above this many times its low end, the high end of an interval leaves too much open."""

Finding = Literal["faster", "slower", "even", "unknown"]

_PICTURES = {"A": "the same picture", "B": "another picture", None: "a picture"}


def bounds(ratio: ConfidenceInterval) -> tuple[float, float] | None:
    """The interval's ends, where both are known."""
    if known(ratio.value) and known(ratio.low) and known(ratio.high):
        return ratio.low, ratio.high
    return None


def finding(ratio: ConfidenceInterval) -> Finding:
    """What an interval of speed tells: ``even`` where it holds 1, ``unknown`` without bounds."""
    if (ends := bounds(ratio)) is None:
        return "unknown"
    low, high = ends
    return "faster" if low > 1 else "slower" if high < 1 else "even"


def is_wide(ratio: ConfidenceInterval) -> bool:
    """Whether the interval is too wide to conclude how large a difference is."""
    ends = bounds(ratio)
    return ends is not None and (ends[0] <= 0 or ends[1] / ends[0] > WIDE)


def in_short(results: Results) -> list[str]:
    """The fastest of ours by class, beside the reference and the fastest peer; wins or not."""
    if not results.entries:
        return []
    timed = [e for e in results.entries if e.status == "ok" and known(e.median.get("total"))]
    if not timed:
        return ["No participant ran to its end."]
    sentences = list(_by_class(results.reference, timed))
    fastest = min(timed, key=_slowness)
    return sentences or [f"{fastest.name} makes an image in {seconds(_total(fastest))}."]


def _by_class(reference: BenchResult | None, timed: Sequence[BenchResult]) -> Iterator[str]:
    for kind, picture in _PICTURES.items():
        alike = [entry for entry in timed if entry.speed_class == kind]
        if ours := [entry for entry in alike if entry.role == "ours"]:
            best = min(ours, key=_slowness)
            said = f"{best.name} makes {picture} in {seconds(_total(best))}"
            ratio = best.ratio.get("total")
            if reference is not None and ratio is not None and known(ratio.value):
                said += f": {_compared('it', ratio, reference.name)}"
            yield f"{said}."
            peers = [entry for entry in alike if entry.role == "peer"]
            if peers and kind == "A":  # other pictures differ from each other too
                yield _beside(best, min(peers, key=_slowness))


def _beside(best: BenchResult, peer: BenchResult) -> str:
    against = _compared(best.name, _paired(best, peer), peer.name)
    return f"The fastest peer that makes it, {peer.name}, takes {seconds(_total(peer))}: {against}."


def _compared(who: str, ratio: ConfidenceInterval, other: str) -> str:
    """Ours beside another in words; the ratio of a slower one is turned round."""
    kind = finding(ratio)
    if kind == "unknown":
        return f"{who} is {ratio.value:.2f} times as fast as {other}, of too few runs to be sure"
    if kind == "even":
        return f"no difference from {other} can be told ({_span(ratio)} times as fast)"
    turned = ratio if kind == "faster" else _inverse(ratio)
    surely = f"(95 % interval {_span(turned)})"
    if is_wide(ratio):
        return f"{who} is {kind} than {other}, but how much cannot be told ({_span(turned)} times)"
    if kind == "slower":
        return f"{who} takes {turned.value:.2f} times as long as {other} {surely}"
    return f"{who} is {turned.value:.2f} times as fast as {other} {surely}"


def _paired(ours: BenchResult, peer: BenchResult) -> ConfidenceInterval:
    """How many times faster ours is, from runs in pairs where there are as many of both."""
    if len(ours.runs) == len(peer.runs) > 0:
        found = ratios(peer.runs, ours.runs)
        if "total" in found:
            return found["total"]
    return ConfidenceInterval(value=_total(peer) / max(_total(ours), 1e-9))


def _inverse(ratio: ConfidenceInterval) -> ConfidenceInterval:
    assert ratio.low is not None and ratio.high is not None
    value, low, high = (max(v, 1e-9) for v in (ratio.value, ratio.low, ratio.high))
    return ConfidenceInterval(value=1 / value, low=1 / high, high=1 / low)


def _span(ratio: ConfidenceInterval) -> str:
    return f"{ratio.low:.2f} to {ratio.high:.2f}"


def _slowness(entry: BenchResult) -> float:
    return entry.slowness if known(entry.slowness) else math.inf


def _total(entry: BenchResult) -> float:
    return entry.median["total"]
