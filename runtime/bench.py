"""How long images take: one pipeline by itself, or several contenders taking turns."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import BackendError, SettingsError
from latentforge.runtime.image import psnr
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.profile import Timings
from latentforge.runtime.progress import Progress

__all__ = [
    "Benchmark",
    "Comparison",
    "Contender",
    "PEERS",
    "Measurement",
    "available_cores",
    "available_memory",
    "compare",
    "contenders",
    "cpu_name",
    "fit_together",
    "peak_memory",
    "summarize",
]


_MEMORY = 3  # times its files, which is what a process takes that paints with them

PEERS: Mapping[str, str] = {"eager": "latentforge.export.eager"}
"""Who our engines can be measured against, and the module that serves each as a process."""


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
            inference_hardware=cpu_name(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            stages={name: value * 1e3 for name, value in summarize(runs).items()},
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


@dataclass(frozen=True)
class Contender:
    """A name, and the command that serves it (see worker.py) once three arguments follow."""

    name: str
    command: tuple[str, ...]

    @classmethod
    def of(cls, engines: Path, name: str) -> Contender:
        """An engine directory, under a name."""
        return cls(name, (sys.executable, "-m", "latentforge.runtime.worker", str(engines)))


def contenders(
    engines: Sequence[Path], *, against: Sequence[str], checkpoint: str
) -> list[Contender]:
    """The peers, as references, and then the engine directories.

    Raises:
        SettingsError: no such peer.
    """
    if unknown := [name for name in against if name not in PEERS]:
        raise SettingsError(f"no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    python = (sys.executable, "-m")
    peers = [Contender(name, (*python, PEERS[name], checkpoint)) for name in against]
    return peers + [Contender.of(path, path.resolve().name) for path in engines]


@dataclass
class Measurement:
    """What one contender took. The first run is kept apart from the others.

    Attributes:
        ready: seconds from the start of the process to the loaded pipeline.
        first: the first run.
        runs: the others, in turn with those of the other contenders.
        peak_memory: bytes held at most.
        image: the last picture, (batch, 3, height, width) in -1..1.
    """

    name: str
    ready: float
    versions: Mapping[str, str]
    first: Timings | None = None
    runs: list[Timings] = field(default_factory=list)
    peak_memory: int = 0
    image: NDArray[np.float32] | None = None

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds by stage, and of one UNet call."""
        return {**summarize(self.runs), "unet step": self._step()}

    def _step(self) -> float:
        return statistics.median(seconds for run in self.runs for seconds in run.stages["unet"])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Contenders on the same job. The first one is the reference of every ratio."""

    settings: Mapping[str, Any]
    threads: int
    machine: Mapping[str, str]
    measurements: tuple[Measurement, ...]

    @property
    def reference(self) -> Measurement:
        """What the others are measured against."""
        return self.measurements[0]

    @property
    def stages(self) -> list[str]:
        """What every contender has, such as the sampler: engines may be cut differently."""
        common = set.intersection(*(set(m.medians) for m in self.measurements))
        return [stage for stage in self.reference.medians if stage in common]

    def ratio(self, other: Measurement, stage: str) -> float:
        """How many times faster ``other`` is: the median over pairs of neighbouring runs."""
        pairs = zip(self.reference.runs, other.runs, strict=True)
        return statistics.median(_seconds(a, stage) / _seconds(b, stage) for a, b in pairs)

    def spread(self, other: Measurement) -> tuple[float, float]:
        """The least and the greatest ratio of whole images among the pairs."""
        pairs = zip(self.reference.runs, other.runs, strict=True)
        ratios = [a.total / b.total for a, b in pairs]
        return min(ratios), max(ratios)

    def psnr(self, other: Measurement) -> float:
        """How close the last pictures are, in dB."""
        assert self.reference.image is not None and other.image is not None
        return psnr(self.reference.image, other.image, peak=2.0)

    def asdict(self) -> dict[str, Any]:
        """The same as plain data, ratios included."""
        return {
            "settings": dict(self.settings),
            "threads": self.threads,
            "machine": dict(self.machine),
            "reference": self.reference.name,
            "contenders": [self._contender(m) for m in self.measurements],
        }

    def _contender(self, measured: Measurement) -> dict[str, Any]:
        assert measured.first is not None
        return {
            "name": measured.name,
            "versions": dict(measured.versions),
            "ready_seconds": measured.ready,
            "first_image_seconds": measured.first.total,
            "peak_memory_bytes": measured.peak_memory,
            "median_seconds": measured.medians,
            "total_seconds": [run.total for run in measured.runs],
            "ratio": {stage: self.ratio(measured, stage) for stage in self.stages},
            "ratio_range": list(self.spread(measured)),
            "psnr": self.psnr(measured),
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        others = self.measurements[1:]
        names = [m.name for m in self.measurements] + [f"{m.name} better by" for m in others]
        yield " " * 14 + "".join(f"{name[:20]:>21}" for name in names)
        for stage in self.stages:
            cells = [f"{m.medians[stage] * 1e3:.1f} ms" for m in self.measurements]
            cells += [f"{self.ratio(m, stage):.2f}x" for m in others]
            yield f"{stage:<14}" + "".join(f"{cell:>21}" for cell in cells)
        yield self._row("start to ready", lambda m: m.ready, "{:.2f} s")
        yield self._row("first image", lambda m: m.first.total if m.first else 0.0, "{:.2f} s")
        yield self._row("peak memory", lambda m: m.peak_memory / 1e6, "{:.0f} MB")
        for m in others:
            low, high = self.spread(m)
            yield (
                f"{m.name}: images {low:.2f}x to {high:.2f}x faster over {len(m.runs)} pairs, "
                f"PSNR {self.psnr(m):.1f} dB to {self.reference.name} at equal seed"
            )

    def _row(self, name: str, value: Any, form: str) -> str:
        values = [value(m) for m in self.measurements]
        cells = [form.format(v) for v in values]
        cells += [f"{values[0] / v:.2f}x" for v in values[1:]]
        return f"{name:<14}" + "".join(f"{cell:>21}" for cell in cells)


def compare(
    contenders: Sequence[Contender],
    settings: str,
    *,
    threads: int,
    repeats: int = 5,
    together: bool = True,
    quiet: bool = True,
) -> Comparison:
    """Let contenders take turns, A B A B, so that a drifting machine hits all alike.

    Args:
        contenders: the first is the reference.
        settings: one request, as worker.settings_to_json wrote it.
        threads: each may use.
        repeats: counted runs of each; one more comes first and is kept apart.
        together: keep all loaded; without it a contender is loaded anew for each of its turns, so
            that one at a time has to fit in memory.
        quiet: show no progress.

    Raises:
        BackendError: a contender ended before its time; the message has its last words.
    """
    total = len(contenders) * (repeats + 2)
    with ExitStack() as stack, Progress(total, quiet=quiet) as progress:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pictures = [folder / f"{index}.npy" for index in range(len(contenders))]
        starts = [
            partial(_worker, contender, settings, threads, picture)
            for contender, picture in zip(contenders, pictures, strict=True)
        ]
        take_turns = _all_loaded if together else _one_loaded
        measurements = take_turns(starts, repeats, progress)
    return Comparison(
        settings=json.loads(settings),
        threads=threads,
        machine={"cpu": cpu_name(), "cores": str(os.cpu_count()), "system": platform.platform()},
        measurements=measurements,
    )


_Start = Callable[[], AbstractContextManager["_Worker"]]


def _all_loaded(
    starts: Sequence[_Start], repeats: int, progress: Progress
) -> tuple[Measurement, ...]:
    with ExitStack() as stack:
        workers = []
        for start in starts:
            with progress.part("load"):
                workers.append(stack.enter_context(start()))
        for _ in range(repeats + 1):
            for worker in workers:
                with progress.part(f"{worker.measured.name}: image"):
                    worker.run()
        return tuple(worker.finish() for worker in workers)


def _one_loaded(
    starts: Sequence[_Start], repeats: int, progress: Progress
) -> tuple[Measurement, ...]:
    """The run after each load is not counted."""
    rounds: list[list[Measurement]] = []
    for _ in range(repeats):
        rounds.append([])
        for start in starts:
            with start() as worker, progress.part(f"{worker.measured.name}: image"):
                worker.run()
                worker.run()
                rounds[-1].append(worker.finish())
    for later in rounds[1:]:
        for kept, measured in zip(rounds[0], later, strict=True):
            kept.runs += measured.runs
            kept.peak_memory = max(kept.peak_memory, measured.peak_memory)
    return tuple(rounds[0])


class _Worker:
    """The parent's side of a contender's process."""

    def __init__(self, process: subprocess.Popen[str], name: str, picture: Path, log: Path) -> None:
        self._process = process
        self._picture = picture
        self._log = log
        start = time.perf_counter()
        self.measured = Measurement(name, 0.0, {})
        self.measured.versions = self._answer()["versions"]
        self.measured.ready = time.perf_counter() - start

    def run(self) -> None:
        """Ask for one image and keep what it took."""
        assert self._process.stdin is not None
        try:
            print("run", file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer that is missing says why
        answer = self._answer()
        stages = {name: tuple(calls) for name, calls in answer["stages"].items()}
        timings = Timings(stages, answer["total"])
        if self.measured.first is None:
            self.measured.first = timings
        else:
            self.measured.runs.append(timings)
        self.measured.peak_memory = answer["peak_memory"]

    def finish(self) -> Measurement:
        """What was measured, with the last picture."""
        self.measured.image = np.load(self._picture)
        return self.measured

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            words = self._log.read_text(errors="replace").strip().splitlines() or ["no message"]
            raise BackendError(f"{self.measured.name} ended early: {words[-1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def _worker(contender: Contender, settings: str, threads: int, picture: Path) -> Iterator[_Worker]:
    log = picture.with_suffix(".log")
    command = [*contender.command, settings, str(threads), str(picture)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield _Worker(process, contender.name, picture, log)
    finally:
        process.kill()
        process.communicate()


def _seconds(run: Timings, stage: str) -> float:
    if stage == "total":
        return run.total
    if stage == "unet step":
        return statistics.median(run.stages["unet"])
    return max(run.seconds[stage], 1e-9)


def summarize(runs: Sequence[Timings]) -> dict[str, float]:
    """The median seconds of every stage over runs, and of their total."""
    seconds = [{**run.seconds, "total": run.total} for run in runs]
    return {name: statistics.median(run[name] for run in seconds) for name in seconds[0]}


def available_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes that programs can still get, where the system tells."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def fit_together(sizes: Sequence[int]) -> bool | None:
    """Whether engines of so many bytes can all be loaded at once; None if not even one can."""
    free = (available_memory() or math.inf) / _MEMORY
    return None if max(sizes) > free else sum(sizes) < free


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
