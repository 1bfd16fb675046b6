"""How long images take: the summary of repeated runs."""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from latentforge.runtime.manifest import Manifest
from latentforge.runtime.profile import Timings

__all__ = ["Benchmark", "peak_memory", "summarize"]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The summary of repeated image runs, under the names that Infery's result had.

    Times are in milliseconds and memory in MB, both as Infery gave them; ``stages`` is ours:
    the median of each stage.
    """

    batch_size: int
    batch_inf_time: float
    batch_inf_time_variance: float
    sample_inf_time: float
    throughput: float
    memory: float
    framework_type: str
    inference_hardware: str
    date: str
    stages: Mapping[str, float]

    @classmethod
    def of(cls, manifest: Manifest, batch_size: int, runs: Sequence[Timings]) -> Benchmark:
        """Summarize runs of batch_size images each."""
        totals = [run.total * 1e3 for run in runs]
        median = statistics.median(totals)
        return cls(
            batch_size=batch_size,
            batch_inf_time=median,
            batch_inf_time_variance=statistics.pvariance(totals),
            sample_inf_time=median / batch_size,
            throughput=batch_size / median * 1e3,
            memory=peak_memory() / 1e6,
            framework_type=", ".join(sorted({c.backend for c in manifest.components.values()})),
            inference_hardware=platform.processor() or platform.machine(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            stages={name: value * 1e3 for name, value in summarize(runs).items()},
        )

    def asdict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.batch_inf_time:.1f} ms a batch of {self.batch_size}, "
            f"{self.throughput:.2f} images a second, peak memory {self.memory:.0f} MB"
        ]
        lines += [f"  {name:<14} {value:9.1f} ms" for name, value in self.stages.items()]
        return "\n".join(lines)


def summarize(runs: Sequence[Timings]) -> dict[str, float]:
    """The median seconds of every stage over runs, and of their total."""
    seconds = [{**run.seconds, "total": run.total} for run in runs]
    return {name: statistics.median(run[name] for run in seconds) for name in seconds[0]}


def peak_memory() -> int:
    """Bytes of memory this process has held at most (peak resident set).

    On Linux from /proc, since getrusage there starts from the parent's figure.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource  # not on Windows, which we do not measure

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
