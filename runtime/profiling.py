"""Where the time goes: by stage for every image, by layer on request."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from latentforge.runtime.backends import LayerTime
from latentforge.runtime.machine import cpu_name, peak_memory, resident_memory

__all__ = ["Benchmark", "Profile", "Stopwatch", "Timings"]


@dataclass(frozen=True)
class Timings:
    """Seconds of one image run: each call of each stage, and all of it together."""

    stages: Mapping[str, tuple[float, ...]]
    total: float

    @property
    def seconds(self) -> dict[str, float]:
        """The sum of each stage; ``sampler`` is what no engine accounts for."""
        sums = {name: sum(calls) for name, calls in self.stages.items()}
        return {**sums, "sampler": max(0.0, self.total - sum(sums.values()))}

    @property
    def step(self) -> float:
        """The median of the UNet's calls."""
        return statistics.median(self.stages["denoiser"])

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.3f}" for name, value in self.seconds.items())
        return f"{self.total:.3f} s ({parts})"


class Stopwatch:
    """Collects what becomes Timings; counts only the time inside its own blocks."""

    def __init__(self) -> None:
        self._stages: defaultdict[str, list[float]] = defaultdict(list)
        self._total = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one call of a stage."""
        start = time.perf_counter()
        yield
        self._stages[name].append(time.perf_counter() - start)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block towards the total; a caller's pause between is not."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._total += time.perf_counter() - start

    def timings(self) -> Timings:
        """What has been measured so far."""
        return Timings({name: tuple(calls) for name, calls in self._stages.items()}, self._total)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The summary of repeated image runs, under the names that Infery's result had.

    Times are in milliseconds and memory in MB, both as Infery gave them. What Infery said of copies
    to and from a device is in no run of ours: pictures come as a whole, prompt to pixels, so that
    ``include_io`` is always true.

    Attributes:
        batch_inf_time: of a batch of pictures, the median; its variance is over the runs.
        memory: most that the process ever held; ``pre_inference_memory_used`` before the first of
            these runs and ``post_inference_memory_used`` after the last.
        first_inf_time: of the run that came first and is not among the others.
        stages: the median milliseconds of each stage, and of one UNet step.
    """

    batch_size: int
    batch_inf_time: float
    batch_inf_time_variance: float
    sample_inf_time: float
    throughput: float
    first_inf_time: float
    memory: float
    pre_inference_memory_used: float
    post_inference_memory_used: float
    include_io: bool = True
    framework_type: str
    framework_version: str
    inference_hardware: str
    date: str
    stages: Mapping[str, float]

    @classmethod
    def of(
        cls,
        versions: Mapping[str, str],
        batch_size: int,
        runs: Sequence[Timings],
        *,
        memory_before: int,
    ) -> Benchmark:
        """Summarize runs of batch_size images each, of which the first is kept apart."""
        first, counted = runs[0], runs[1:]
        totals = [run.total * 1e3 for run in counted]
        median = statistics.median(totals)
        return cls(
            batch_size=batch_size,
            batch_inf_time=median,
            batch_inf_time_variance=statistics.pvariance(totals),
            sample_inf_time=median / batch_size,
            throughput=batch_size / median * 1e3,
            first_inf_time=first.total * 1e3,
            memory=peak_memory() / 1e6,
            pre_inference_memory_used=memory_before / 1e6,
            post_inference_memory_used=resident_memory() / 1e6,
            framework_type=", ".join(versions),
            framework_version=", ".join(versions.values()),
            inference_hardware=cpu_name(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            stages=_stages(counted),
        )

    def asdict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        head = (
            f"{self.batch_inf_time:.1f} ms a batch of {self.batch_size}, "
            f"{self.throughput:.2f} images a second, peak memory {self.memory:.0f} MB"
        )
        return "\n".join([head, *(f"  {k:<14} {v:9.1f} ms" for k, v in self.stages.items())])


def _stages(runs: Sequence[Timings]) -> dict[str, float]:
    stages = [{**run.seconds, "denoiser step": run.step, "total": run.total} for run in runs]
    return {name: statistics.median(run[name] * 1e3 for run in stages) for name in stages[0]}


@dataclass(frozen=True)
class Profile:
    """Layers by the time they took, hottest first, and the seconds of all of them together."""

    layers: tuple[LayerTime, ...]
    total: float

    @classmethod
    def of(cls, layers: Iterable[LayerTime]) -> Profile:
        """Sort the layers and sum their time."""
        hottest = sorted(layers, key=lambda layer: layer.seconds, reverse=True)
        return cls(tuple(hottest), sum(layer.seconds for layer in hottest))

    def top(self, count: int) -> Profile:
        """The hottest layers, with their shares of the whole."""
        return Profile(self.layers[:count], self.total)

    def __str__(self) -> str:
        lines = [f"{'ms':>9}  {'share':>6}  {'operator':<22}  layer"]
        for layer in self.layers:
            share = layer.seconds / self.total if self.total else 0.0
            lines.append(
                f"{layer.seconds * 1e3:9.2f}  {share:6.1%}  {layer.operator:<22}  {layer.name}"
            )
        return "\n".join(lines)
