"""Throughput of the replicas, measured while they run."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Throughput"]

_RECENT = 0.2  # weight of the last measurement, once there are five
_SPREAD = 0.25  # weight of its distance below the average
_SHORTFALLS = 4.0  # below the average: few batches are slower
_RESERVE = 0.1  # at least, since a server with many times its load takes time from its workers
_MOST = 0.3  # at most


@dataclass(eq=False)
class _Busy:
    """Work that a replica did since the last measurement, its seconds, and when it reported."""

    reported: float
    work: float = 0.0
    seconds: float = 0.0


@dataclass(eq=False)
class Throughput:
    """Work per second of one replica of each model, as an average that forgets.

    A replica does one step at a time, so the time between two of its reports is that of a step,
    whichever of its batches that belongs to, and of what the server did before it.

    Attributes:
        rates: averages by model.
        shortfalls: mean distance of the measurements below the average, by model.
        counts: number of the measurements, by model.
    """

    rates: dict[str, float] = field(default_factory=dict)
    shortfalls: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    _busy: dict[int, _Busy] = field(default_factory=dict)

    def begin(self, replica: int, now: float) -> None:
        """Note that a replica has something to run."""
        if replica not in self._busy:
            self._busy[replica] = _Busy(now)

    def report(self, replica: int, work: float, now: float) -> None:
        """Note that a replica did some work since it reported before."""
        if (busy := self._busy.get(replica)) is not None:
            busy.work += work
            busy.seconds += now - busy.reported
            busy.reported = now

    def measure(self, model: str, replica: int) -> None:
        """Take what a replica did since the last measurement into the average."""
        if (busy := self._busy.get(replica)) is None or busy.seconds <= 0:
            return
        self.observe(model, busy.work / busy.seconds)
        busy.work = busy.seconds = 0.0

    def observe(self, model: str, rate: float) -> None:
        """Take a measurement into the average."""
        before, short = self.rates.get(model, rate), self.shortfalls.get(model, 0.0)
        count = self.counts[model] = self.counts.get(model, 0) + 1
        self.rates[model] = before + max(_RECENT, 1 / count) * (rate - before)
        self.shortfalls[model] = short + _SPREAD * (max(0.0, before - rate) - short)

    def sure(self, model: str) -> float | None:
        """Return the rate that a model hardly falls below; None before a measurement.

        It is the average less what batches fall short of it, as TCP bounds the time of an answer
        (Jacobson 1988): what is promised by an average alone is broken half the time. Batches that
        are faster, such as all after the first, make nothing less sure.
        """
        if (rate := self.rates.get(model)) is None:
            return None
        reserve = max(_RESERVE * rate, _SHORTFALLS * self.shortfalls[model])
        return rate - min(reserve, _MOST * rate)

    def end(self, replica: int) -> None:
        """Note that a replica finds nothing to run, or is gone."""
        self._busy.pop(replica, None)
