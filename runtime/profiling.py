"""Repeated image runs, and the time of each layer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from latentforge.runtime.backends import LayerTime
from latentforge.runtime.engine import Engine
from latentforge.runtime.machine import cpu_name, peak_memory, resident_memory
from latentforge.runtime.timings import Timings
from latentforge.runtime.validation import check_count

__all__ = ["PROMPT", "Benchmark", "Profile"]

PROMPT = "a photo of a cat"
"""Prompt of the runs if the caller has no preference."""

_MAX_REPETITIONS = 1000


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Summary of repeated image runs, under the names that Infery's benchmark result had.

    Times are in milliseconds and memory in MB, as in Infery. Every run goes from prompt to pixels,
    so include_io is always true, and there are no separate figures for copies to and from a device.

    Attributes:
        batch_size: images per run.
        batch_inf_time: median of the runs; the variance is over the runs.
        sample_inf_time: the median divided by the batch size.
        throughput: images per second.
        first_inf_time: time of the first run, which is not among the others.
        memory: peak memory of the process.
        pre_inference_memory_used, post_inference_memory_used: resident memory before the first run
            and after the last.
        framework_type, framework_version: libraries that run the engines.
        stages: median milliseconds of each stage, and of one denoiser step.
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
    def measure(
        cls,
        run: Callable[[], Timings],
        *,
        batch_size: int,
        repetitions: int,
        versions: Mapping[str, str],
    ) -> Benchmark:
        """Run once without counting, then `repetitions` times, and summarize.

        Args:
            run: makes batch_size images.
            batch_size, repetitions: images per run, and counted runs.
            versions: libraries that run the engines, and their versions.

        Raises:
            SettingsError: repetitions is no positive integer.
        """
        check_count("repetitions", repetitions, _MAX_REPETITIONS)
        memory_before = resident_memory()
        first, *counted = (run() for _ in range(repetitions + 1))
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
        """Return the fields as a dictionary of plain data."""
        return asdict(self)

    def __str__(self) -> str:
        head = (
            f"{self.batch_inf_time:.1f} ms per batch of {self.batch_size}, "
            f"{self.throughput:.2f} images per second, peak memory {self.memory:.0f} MB"
        )
        return "\n".join([head, *(f"  {k:<14} {v:9.1f} ms" for k, v in self.stages.items())])


def _stages(runs: Sequence[Timings]) -> dict[str, float]:
    stages = [{**run.seconds, "denoiser step": run.step, "total": run.total} for run in runs]
    return {name: statistics.median(run[name] * 1e3 for run in stages) for name in stages[0]}


@dataclass(frozen=True)
class Profile:
    """Layers in the order of their time, slowest first.

    Attributes:
        layers: all layers, or the slowest of them.
        total: seconds of all layers together.
    """

    layers: tuple[LayerTime, ...]
    total: float

    @classmethod
    def of(cls, engines: Mapping[str, Engine]) -> Profile:
        """Collect the layers of engines loaded with ``profile=True``, as COMPONENT/LAYER.

        This ends the recording.
        """
        layers = [
            layer._replace(name=f"{name}/{layer.name}")
            for name, engine in engines.items()
            for layer in engine.session.layers()
        ]
        layers.sort(key=lambda layer: layer.seconds, reverse=True)
        return cls(tuple(layers), sum(layer.seconds for layer in layers))

    def top(self, count: int) -> Profile:
        """Return the slowest layers; shares remain relative to all layers."""
        return Profile(self.layers[:count], self.total)

    def __str__(self) -> str:
        lines = [f"{'ms':>9}  {'share':>6}  {'operator':<22}  layer"]
        for layer in self.layers:
            share = layer.seconds / self.total if self.total else 0.0
            lines.append(
                f"{layer.seconds * 1e3:9.2f}  {share:6.1%}  {layer.operator:<22}  {layer.name}"
            )
        return "\n".join(lines)
