"""Throughput of the replicas, measured while they run."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Throughput"]

_RECENT = 0.2  # weight of the last measurement


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
    whichever of its batches that belongs to.
    """

    rates: dict[str, float] = field(default_factory=dict)
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
        before = self.rates.get(model, rate)
        self.rates[model] = before + _RECENT * (rate - before)

    def end(self, replica: int) -> None:
        """Note that a replica has nothing to run, or is gone."""
        self._busy.pop(replica, None)
