"""What got slower, larger or worse between two measurements of the same request.

A figure with an interval has changed when it is off by more than the tolerance and the two
intervals don't overlap. Speed is the ratio to the reference where both files have one of the same
name, since seconds drift between runs and machines and a ratio of neighbours doesn't; the
reference's own seconds are then noted and not judged, unless nothing else ran. Else it is the
median of the runs, with their range as its interval. A single value, such as memory or files, has
none and is judged by the tolerance alone. A metric with intervals on both sides is judged by those
alone: a small loss that is certain is a loss.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from latentforge.measure.results import BenchResult, ConfidenceInterval, Metric, Results
from latentforge.runtime.errors import ResultsError
from latentforge.runtime.text import size_text

__all__ = ["Change", "Verdict", "judge"]

Outcome = Literal["better", "same", "worse"]

_ELSEWHERE = ("seed", "prompts", "negative_prompts")  # cost the same time, and make other pictures
_STAGES = {
    "total": "image",
    "denoiser step": "UNet step",
    "text_encoder": "text encoder",
    "vae_decoder": "VAE decoder",
}
_SINGLE: Mapping[str, str] = {
    "peak_memory": "peak memory",
    "device_memory": "device memory",
    "file_bytes": "files",
}
_SEEN = 80.0  # dB; nobody sees a difference beyond, so that there is none to judge


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one participant, then and now, in words."""

    subject: str
    what: str
    outcome: Outcome
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.what} {self.text}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All that was compared, and ``notes`` on what makes the two differ from the outset."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> tuple[Change, ...]:
        """What got slower, larger, worse, or lost."""
        return self._of("worse")

    @property
    def failed(self) -> bool:
        """Whether anything got worse."""
        return bool(self.worse)

    def _of(self, outcome: Outcome) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.outcome == outcome)

    def __str__(self) -> str:
        lines = [f"note    {note}" for note in self.notes]
        for outcome in ("worse", "better"):
            lines += [f"{outcome:<8}{change}" for change in self._of(outcome)]
        return "\n".join([*lines, f"{len(self._of('same'))} figures are as they were"])


def judge(old: Results, new: Results, *, tolerance: float = 0.05) -> Verdict:
    """Compare what both have.

    Args:
        old: what it should be no worse than.
        new: what is judged.
        tolerance: the share by which a figure may get worse.

    Raises:
        ResultsError: they are of different requests, or have nothing in common.
    """
    _check_settings(old, new)
    changes = (*_participants(old, new, tolerance), *_metrics(old, new, tolerance))
    if not changes:
        raise ResultsError(
            "the two have no participant and no metric in common: nothing to compare"
        )
    return Verdict(changes=changes, notes=tuple(_notes(old, new, tolerance)))


def _check_settings(old: Results, new: Results) -> None:
    then, now = ({**r.settings, "threads": r.threads} for r in (old, new))
    keys = [key for key in dict.fromkeys([*then, *now]) if key not in _ELSEWHERE]
    differing = [key for key in keys if _plain(then.get(key)) != _plain(now.get(key))]
    if differing:
        said = ", ".join(f"{key} {then.get(key)} and {now.get(key)}" for key in differing)
        raise ResultsError(f"not the same request: {said}; measure with the same settings")


def _plain(value: Any) -> Any:
    """As JSON would have it, which knows no tuples."""
    return list(value) if isinstance(value, tuple) else value


def _notes(old: Results, new: Results, tolerance: float) -> Iterator[str]:
    for key in dict.fromkeys([*old.machine, *new.machine]):
        then, now = old.machine.get(key, "unknown"), new.machine.get(key, "unknown")
        if then != now:
            yield f"another machine: {key} was {then} and is {now}"
    for key in _ELSEWHERE:
        if _plain(old.settings.get(key)) != _plain(new.settings.get(key)):
            yield f"other pictures: not the same {key}"
    known = {entry.name for entry in old.entries}
    yield from (f"{entry.name} is new" for entry in new.entries if entry.name not in known)
    yield from _yardstick(old, new, tolerance)


def _yardstick(old: Results, new: Results, tolerance: float) -> Iterator[str]:
    """What speed is told in, and whether that has changed itself."""
    if name := _common_reference(old, new):
        yield f"speed is how many times faster than {name}, in pairs of runs"
        before, after = (_median(_entry(results, name), "total") for results in (old, new))
        if before and after and abs(after.value - before.value) > tolerance * before.value:
            said = f"took {_seconds(before.value)} and takes {_seconds(after.value)}"
            yield f"{name}, the reference, {said}"


# participants


def _participants(old: Results, new: Results, tolerance: float) -> Iterator[Change]:
    paired = _common_reference(old, new)
    for then in old.entries:
        now = _entry(new, then.name)
        if then.name == paired and now:
            yield from _resources(then, now, tolerance)
        elif then.status == "ok" or (now and now.status == "ok"):
            yield from _participant(then, now, tolerance, by_ratio=paired is not None)


def _participant(
    then: BenchResult, now: BenchResult | None, tolerance: float, *, by_ratio: bool
) -> Iterator[Change]:
    if now is None or now.status != "ok":
        said = f"{now.status}: {now.message}" if now else "gone"
        yield Change(subject=then.name, what="now", outcome="worse", text=said)
    elif then.status != "ok":
        said = f"runs; {then.status} then"
        yield Change(subject=then.name, what="now", outcome="better", text=said)
    else:
        yield from _speed(then, now, tolerance, by_ratio)
        yield from _resources(then, now, tolerance)
        yield from _picture(then, now, tolerance)


def _speed(
    then: BenchResult, now: BenchResult, tolerance: float, by_ratio: bool
) -> Iterator[Change]:
    for stage, name in _STAGES.items():
        if by_ratio and stage in then.ratio and stage in now.ratio:
            before, after = then.ratio[stage], now.ratio[stage]
            yield _change(then.name, name, before, after, tolerance, _times, better="higher")
        elif (first := _median(then, stage)) and (second := _median(now, stage)):
            yield _change(then.name, name, first, second, tolerance, _seconds)


def _resources(then: BenchResult, now: BenchResult, tolerance: float) -> Iterator[Change]:
    """Single values, and the starts, which are some."""
    if then.ready_seconds and now.ready_seconds:
        before, after = _of(then.ready_seconds), _of(now.ready_seconds)
        yield _change(then.name, "start to ready", before, after, tolerance, _seconds)
    for key, name in _SINGLE.items():
        values = getattr(then, key), getattr(now, key)
        if None not in values:
            before, after = (ConfidenceInterval(value=value) for value in values)
            yield _change(then.name, name, before, after, tolerance, size_text)


def _picture(then: BenchResult, now: BenchResult, tolerance: float) -> Iterator[Change]:
    """How close to the reference's, and whether it is still the same picture."""
    if then.psnr is not None and now.psnr is not None:
        before, after = (
            ConfidenceInterval(value=min(value, _SEEN)) for value in (then.psnr, now.psnr)
        )
        yield _change(then.name, "PSNR", before, after, tolerance, _decibels, better="higher")
    if then.speed_class and now.speed_class and then.speed_class != now.speed_class:
        outcome: Outcome = "worse" if now.speed_class == "B" else "better"
        text = f"was {then.speed_class} and is {now.speed_class}"
        yield Change(subject=then.name, what="class", outcome=outcome, text=text)


def _common_reference(old: Results, new: Results) -> str | None:
    """The reference's name, if both ran one of the same name, and something beside it."""
    then, now = old.reference, new.reference
    if then is None or now is None or then.name != now.name:
        return None
    beside = any(entry.status == "ok" and entry is not then for entry in old.entries)
    return then.name if beside and then.status == now.status == "ok" else None


def _entry(results: Results, name: str) -> BenchResult | None:
    return next((entry for entry in results.entries if entry.name == name), None)


def _median(entry: BenchResult | None, stage: str) -> ConfidenceInterval | None:
    """A stage's median and range over the runs."""
    if entry is None or stage not in entry.median:
        return None
    taken = [run.seconds[stage] for run in entry.runs if stage in run.seconds]
    span = _of(taken) if len(taken) > 1 else ConfidenceInterval(value=0)
    return ConfidenceInterval(value=entry.median[stage], low=span.low, high=span.high)


def _of(values: Sequence[float]) -> ConfidenceInterval:
    """The median of values, with their range where there are several."""
    low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
    return ConfidenceInterval(value=statistics.median(values), low=low, high=high)


# metrics


def _metrics(old: Results, new: Results, tolerance: float) -> Iterator[Change]:
    now = {_key(metric): metric for metric in new.metrics}
    for then in old.metrics:
        if (after := now.get(_key(then))) is not None:
            yield _metric(then, after, tolerance)


def _metric(then: Metric, now: Metric, tolerance: float) -> Change:
    before, after = (ConfidenceInterval(value=m.value, low=m.low, high=m.high) for m in (then, now))
    bounded = None not in (before.low, before.high, after.low, after.high)
    allowed = 0.0 if bounded else tolerance
    name = then.name + (f" to {then.reference}" if then.reference else "")
    return _change(then.subject, name, before, after, allowed, _figure, better=then.better)


def _key(metric: Metric) -> tuple[str, str, str, str]:
    return metric.name, metric.subject, metric.reference, metric.network


# both


def _change(
    subject: str,
    what: str,
    then: ConfidenceInterval,
    now: ConfidenceInterval,
    tolerance: float,
    say: Callable[[float], str],
    *,
    better: Literal["higher", "lower"] = "lower",
) -> Change:
    """Beyond the tolerance, and with intervals apart where both have one."""
    off = abs(now.value - then.value) > tolerance * abs(then.value) + 1e-12
    improved = (now.value > then.value) == (better == "higher")
    outcome: Outcome = "same"
    if off and not _overlap(then, now):
        outcome = "better" if improved else "worse"
    part = f" ({now.value / then.value - 1:+.1%})" if then.value else ""
    text = f"was {say(then.value)} and is {say(now.value)}{part}"
    return Change(subject=subject, what=what, outcome=outcome, text=text)


def _overlap(then: ConfidenceInterval, now: ConfidenceInterval) -> bool:
    if then.low is None or then.high is None or now.low is None or now.high is None:
        return False
    return then.low <= now.high and now.low <= then.high


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if value < _SEEN else f"{value:g} dB or more"


def _figure(value: float) -> str:
    return f"{value:.4g}"
