"""Comparison of two result files of the same request: what became slower, larger or worse.

A value with a confidence interval has changed if the change exceeds the tolerance and the two
intervals do not overlap. Speed is compared as the speedup over the reference if both files have one
of the same name: seconds drift between measurements and machines, and a ratio of neighbouring runs
does not. A change of the reference's own seconds is then only a note, unless nothing else was
measured. Otherwise speed is the median of the runs. A speed whose interval has a level below
conclusion.MIN_LEVEL supports no conclusion, and a change of it is reported as unclear. A single
value, such as memory or file size, has no interval and is compared by the tolerance alone. Quality
metrics with intervals in both files are compared by those alone: a small loss that is certain is a
loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msgspec.structs import replace

from latentforge.measure.conclusion import MIN_LEVEL, too_few_runs
from latentforge.measure.results import BenchResult, ConfidenceInterval, Metric, Results
from latentforge.measure.statistics import median_interval
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.errors import ResultsError
from latentforge.runtime.text import size_text

__all__ = ["Change", "Verdict", "judge"]

Outcome = Literal["better", "same", "worse", "unclear"]

_FREE_SETTINGS = ("seed", "prompts", "negative_prompts")  # change the images, not the time
_STAGES = {
    "total": "image",
    "denoiser step": "denoiser step",
    "text_encoder": "text encoder",
    "vae_decoder": "VAE decoder",
}
_SINGLE_VALUES: Mapping[str, str] = {
    "peak_memory": "peak memory",
    "device_memory": "device memory",
    "file_bytes": "file size",
}
_MAX_PSNR = 80.0  # dB, beyond which no difference is visible


@dataclass(frozen=True, kw_only=True)
class Change:
    """Change of one quantity of one participant."""

    subject: str
    quantity: str
    outcome: Outcome
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.quantity} {self.text}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All quantities that both files have, and ``notes`` on differences in their measurement."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> tuple[Change, ...]:
        """Changes for the worse, lost participants included."""
        return self._with("worse")

    @property
    def failed(self) -> bool:
        """True if anything became worse."""
        return bool(self.worse)

    def _with(self, outcome: Outcome) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.outcome == outcome)

    def __str__(self) -> str:
        lines = [f"note    {note}" for note in self.notes]
        for outcome in ("worse", "unclear", "better"):
            lines += [f"{outcome:<8}{change}" for change in self._with(outcome)]
        return "\n".join([*lines, f"{len(self._with('same'))} values unchanged"])


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    """One quantity in both files.

    Attributes:
        runs: timed runs in each file, for quantities that are medians over runs.
        text: how to write a value.
    """

    subject: str
    name: str
    old: ConfidenceInterval
    new: ConfidenceInterval
    text: Callable[[float], str]
    better: Literal["higher", "lower"] = "lower"
    runs: tuple[int, int] | None = None


@checked_arguments
def judge(old: Results, new: Results, *, tolerance: float = 0.05) -> Verdict:
    """Compare two measurements of the same request.

    Args:
        old: the baseline.
        new: the measurement that should be no worse.
        tolerance: relative change up to which a quantity counts as unchanged.

    Raises:
        ResultsError: the requests differ, or the files have nothing in common.
    """
    _check_settings(old, new)
    changes = (*_participants(old, new, tolerance), *_metrics(old, new, tolerance))
    if not changes:
        raise ResultsError(
            "nothing to compare: the files have no participant and no metric in common"
        )
    return Verdict(changes=changes, notes=tuple(_notes(old, new, tolerance)))


def _check_settings(old: Results, new: Results) -> None:
    before, after = ({**r.settings, "threads": r.threads} for r in (old, new))
    keys = [key for key in dict.fromkeys([*before, *after]) if key not in _FREE_SETTINGS]
    differing = [key for key in keys if _as_json(before.get(key)) != _as_json(after.get(key))]
    if differing:
        listed = ", ".join(f"{key} {before.get(key)} and {after.get(key)}" for key in differing)
        raise ResultsError(f"the requests differ: {listed}; measure with the same settings")


def _as_json(value: Any) -> Any:
    """Return a value as it is after a round trip through JSON, which has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def _notes(old: Results, new: Results, tolerance: float) -> Iterator[str]:
    for key in dict.fromkeys([*old.machine, *new.machine]):
        before, after = old.machine.get(key, "unknown"), new.machine.get(key, "unknown")
        if before != after:
            yield f"different machine: {key} was {before} and is {after}"
    for key in _FREE_SETTINGS:
        if _as_json(old.settings.get(key)) != _as_json(new.settings.get(key)):
            yield f"different images: {key} changed"
    names = {entry.name for entry in old.entries}
    yield from (f"{entry.name} is new" for entry in new.entries if entry.name not in names)
    yield from _reference_notes(old, new, tolerance)


def _reference_notes(old: Results, new: Results, tolerance: float) -> Iterator[str]:
    """Name the reference of the speedups, and tell if it became faster or slower itself."""
    if name := _common_reference(old, new):
        yield f"speed is the speedup over {name}, from pairs of runs"
        before, after = (_time(_entry(results, name), "total") for results in (old, new))
        if before and after and abs(after.value - before.value) > tolerance * before.value:
            change = f"took {_seconds(before.value)} and takes {_seconds(after.value)}"
            yield f"{name}, the reference, {change}"


# participants


def _participants(old: Results, new: Results, tolerance: float) -> Iterator[Change]:
    reference = _common_reference(old, new)
    for before in old.entries:
        after = _entry(new, before.name)
        if before.name == reference and after:
            yield from _judged(_resources(before, after), tolerance)
        elif before.status == "ok" or (after and after.status == "ok"):
            yield from _participant(before, after, tolerance, by_speedup=reference is not None)


def _participant(
    before: BenchResult, after: BenchResult | None, tolerance: float, *, by_speedup: bool
) -> Iterator[Change]:
    if after is None or after.status != "ok":
        text = f"{after.status}: {after.message}" if after else "missing from the new file"
        yield Change(subject=before.name, quantity="now", outcome="worse", text=text)
    elif before.status != "ok":
        text = f"runs, and was {before.status}"
        yield Change(subject=before.name, quantity="now", outcome="better", text=text)
    else:
        yield from _judged(_speed(before, after, by_speedup), tolerance)
        yield from _judged(_resources(before, after), tolerance)
        yield from _judged(_psnr(before, after), tolerance)
        yield from _class_change(before, after)


def _speed(before: BenchResult, after: BenchResult, by_speedup: bool) -> Iterator[_Quantity]:
    runs = len(before.runs), len(after.runs)
    for stage, name in _STAGES.items():
        if by_speedup and stage in before.ratio and stage in after.ratio:
            yield _Quantity(
                subject=before.name,
                name=name,
                old=before.ratio[stage],
                new=after.ratio[stage],
                text=_speedup,
                better="higher",
                runs=runs,
            )
        elif (old := _time(before, stage)) and (new := _time(after, stage)):
            yield _Quantity(
                subject=before.name, name=name, old=old, new=new, text=_seconds, runs=runs
            )


def _resources(before: BenchResult, after: BenchResult) -> Iterator[_Quantity]:
    if before.ready_seconds and after.ready_seconds:
        yield _Quantity(
            subject=before.name,
            name="load time",
            old=median_interval(before.ready_seconds),
            new=median_interval(after.ready_seconds),
            text=_seconds,
            runs=(len(before.ready_seconds), len(after.ready_seconds)),
        )
    for key, name in _SINGLE_VALUES.items():
        values = getattr(before, key), getattr(after, key)
        if None not in values:
            old, new = (ConfidenceInterval(value=value) for value in values)
            yield _Quantity(subject=before.name, name=name, old=old, new=new, text=size_text)


def _psnr(before: BenchResult, after: BenchResult) -> Iterator[_Quantity]:
    if before.psnr is not None and after.psnr is not None:
        old, new = (
            ConfidenceInterval(value=min(value, _MAX_PSNR)) for value in (before.psnr, after.psnr)
        )
        yield _Quantity(
            subject=before.name, name="PSNR", old=old, new=new, text=_decibels, better="higher"
        )


def _class_change(before: BenchResult, after: BenchResult) -> Iterator[Change]:
    if before.speed_class and after.speed_class and before.speed_class != after.speed_class:
        outcome: Outcome = "worse" if after.speed_class == "B" else "better"
        text = f"was {before.speed_class} and is {after.speed_class}"
        yield Change(subject=before.name, quantity="class", outcome=outcome, text=text)


def _common_reference(old: Results, new: Results) -> str | None:
    """Return the reference's name if both files have timed it and another participant."""
    before, after = old.reference, new.reference
    if before is None or after is None or before.name != after.name:
        return None
    compared = any(entry.status == "ok" and entry is not before for entry in old.entries)
    return before.name if compared and before.status == after.status == "ok" else None


def _entry(results: Results, name: str) -> BenchResult | None:
    return next((entry for entry in results.entries if entry.name == name), None)


def _time(entry: BenchResult | None, stage: str) -> ConfidenceInterval | None:
    """Return a stage's median over the runs, with its interval."""
    if entry is None or stage not in entry.median:
        return None
    seconds = [run.seconds[stage] for run in entry.runs if stage in run.seconds]
    interval = median_interval(seconds) if seconds else ConfidenceInterval(value=0)
    return replace(interval, value=entry.median[stage])


# metrics


def _metrics(old: Results, new: Results, tolerance: float) -> Iterator[Change]:
    by_key = {_key(metric): metric for metric in new.metrics}
    for before in old.metrics:
        if (after := by_key.get(_key(before))) is not None:
            yield _metric(before, after, tolerance)


def _metric(before: Metric, after: Metric, tolerance: float) -> Change:
    old, new = (_interval(metric) for metric in (before, after))
    bounded = old.level is not None and new.level is not None
    name = before.name + (f" to {before.reference}" if before.reference else "")
    quantity = _Quantity(
        subject=before.subject, name=name, old=old, new=new, text=_number, better=before.better
    )
    return _change(quantity, 0.0 if bounded else tolerance)


def _interval(metric: Metric) -> ConfidenceInterval:
    return ConfidenceInterval(
        value=metric.value, low=metric.low, high=metric.high, level=metric.level
    )


def _key(metric: Metric) -> tuple[str, str, str, str]:
    return metric.name, metric.subject, metric.reference, metric.network


# both


def _judged(quantities: Iterator[_Quantity], tolerance: float) -> Iterator[Change]:
    for quantity in quantities:
        yield _change(quantity, tolerance)


def _change(quantity: _Quantity, tolerance: float) -> Change:
    """Judge one quantity.

    It has changed if the change exceeds the tolerance and the two intervals, where both exist, do
    not overlap; for a median over runs, both must exist at a sufficient level.
    """
    old, new = quantity.old, quantity.new
    outcome: Outcome = "same"
    note = ""
    if abs(new.value - old.value) > tolerance * abs(old.value) + 1e-12 and not _overlap(old, new):
        note = _too_few(quantity)
        improved = (new.value > old.value) == (quantity.better == "higher")
        outcome = "unclear" if note else "better" if improved else "worse"
    relative = f" ({new.value / old.value - 1:+.1%})" if old.value else ""
    text = f"was {quantity.text(old.value)} and is {quantity.text(new.value)}{relative}{note}"
    return Change(subject=quantity.subject, quantity=quantity.name, outcome=outcome, text=text)


def _too_few(quantity: _Quantity) -> str:
    """Return why the runs of a quantity support no conclusion; empty if they do."""
    if quantity.runs is None:
        return ""
    files: Sequence[tuple[str, ConfidenceInterval, int]] = (
        ("old", quantity.old, quantity.runs[0]),
        ("new", quantity.new, quantity.runs[1]),
    )
    reasons = [
        f"{name} file has {too_few_runs(interval, runs)}"
        for name, interval, runs in files
        if (interval.level or 0) < MIN_LEVEL
    ]
    return f"; {' and '.join(reasons)}" if reasons else ""


def _overlap(old: ConfidenceInterval, new: ConfidenceInterval) -> bool:
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return False
    return old.low <= new.high and new.low <= old.high


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


def _speedup(value: float) -> str:
    return f"{value:.2f}x"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if value < _MAX_PSNR else f"{value:g} dB or more"


def _number(value: float) -> str:
    return f"{value:.4g}"
