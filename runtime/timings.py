"""Timings of image runs by stage."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Stopwatch", "Timings"]


@dataclass(frozen=True)
class Timings:
    """Seconds of one image run.

    Attributes:
        stages: seconds of each call, by stage.
        total: seconds of the whole run, without pauses between steps.
    """

    stages: Mapping[str, tuple[float, ...]]
    total: float

    @property
    def seconds(self) -> dict[str, float]:
        """Sum of each stage; ``sampler`` is the time outside of all engines."""
        sums = {name: sum(calls) for name, calls in self.stages.items()}
        return {**sums, "sampler": max(0.0, self.total - sum(sums.values()))}

    @property
    def step(self) -> float:
        """Median of the denoiser's full evaluations."""
        return statistics.median(self.stages["denoiser"])

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.3f}" for name, value in self.seconds.items())
        return f"{self.total:.3f} s ({parts})"


class Stopwatch:
    """Collector of Timings, which counts only the time inside its own blocks."""

    def __init__(self) -> None:
        self._stages: defaultdict[str, list[float]] = defaultdict(list)
        self._total = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one call of a stage."""
        start = time.perf_counter()
        yield
        self._stages[name].append(time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add one call of a stage that was timed elsewhere, such as by a GPU."""
        self._stages[name].append(seconds)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the block to the total."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._total += time.perf_counter() - start

    def timings(self) -> Timings:
        """Return the timings so far."""
        return Timings({name: tuple(calls) for name, calls in self._stages.items()}, self._total)
