"""Interleaved runs: participants measured in turn, A B A B, and compared in pairs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.bench import REPEATS
from latentforge.measure.bench.participant_process import MissingError, ParticipantProcess
from latentforge.measure.bench.protocol import BenchJob, Participant
from latentforge.measure.energy import energy_meters
from latentforge.measure.equivalence import engine_psnr
from latentforge.measure.results import BenchResult, TimedRun
from latentforge.measure.statistics import medians, paired_speedups
from latentforge.runtime.cleanups import temporary_folder
from latentforge.runtime.errors import BackendError
from latentforge.runtime.image import psnr
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import Settings

__all__ = ["Measured", "measure", "require_all_ok"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Results of all participants, and the images, (n, 3, height, width), of those that ran."""

    entries: tuple[BenchResult, ...]
    pictures: Mapping[str, Array]


def measure(
    participants: Sequence[Participant],
    settings: Settings,
    *,
    threads: int,
    repeats: int = REPEATS,
    together: bool = True,
    noise: Array | None = None,
    folder: Path | None = None,
    quiet: bool = True,
    outer: Progress | None = None,
) -> Measured:
    """Measure participants with interleaved runs, so that drift of the machine affects all alike.

    A participant that fails is reported as a result; the others continue.

    Args:
        participants: the first is the reference of the comparison.
        settings: the request.
        threads: per participant.
        repeats: timed runs of each; the first run after every start is extra and not counted.
        together: keep all models loaded. Otherwise each participant is started for each of its
            runs, so that only one has to fit in memory.
        noise: initial noise (n, channels, h, w) of unit variance, for participants whose own
            generator differs from torch's.
        folder: for the files that participants convert; a temporary one if None.
        quiet: show no progress.
        outer: progress whose current part shows that of the runs.
    """
    total = len(participants) * (repeats + 2 if together else 3 * repeats)
    with ExitStack() as stack:
        counter = Progress(total, quiet=quiet) if outer is None else outer.inner(total)
        progress = stack.enter_context(counter)
        jobs = stack.enter_context(temporary_folder("latentforge-"))
        if noise is not None:
            np.save(jobs / "noise.npy", noise)
        runners = [
            _Runner(
                participant, _job(participant, settings, threads, jobs, folder or jobs), threads
            )
            for participant in participants
        ]
        (_run_loaded if together else _run_restarted)(runners, repeats, progress)
        return _measured(runners)


def require_all_ok(measured: Measured) -> Measured:
    """Return the measurement unchanged if every participant ran.

    Raises:
        BackendError: a participant failed or is missing.
    """
    for entry in measured.entries:
        if entry.status != "ok":
            raise BackendError(f"{entry.name}: {entry.message}")
    return measured


def _job(
    participant: Participant, settings: Settings, threads: int, jobs: Path, folder: Path
) -> Path:
    name = participant.name.replace("@", "-").replace(":", "-")  # compilers split paths at colons
    files = folder / name
    files.mkdir(parents=True, exist_ok=True)
    path = jobs / f"{name}.json"
    BenchJob(
        model=participant.model,
        settings=replace(settings, **participant.overrides),
        threads=threads,
        picture=str(path.with_suffix(".npy")),
        noise=str(jobs / "noise.npy"),
        folder=str(files),
        scheduler=participant.scheduler,
        device=participant.placement.device,
        precision=participant.placement.precision,
    ).write(path)
    return path


class _Runner:
    """Participant with its process and its measurements so far; it stops at its first failure."""

    def __init__(self, participant: Participant, job: Path, threads: int) -> None:
        self.participant = participant
        self.failure: BackendError | None = None
        self._job = job
        self._threads = threads
        self._meters = energy_meters()
        self._process: ParticipantProcess | None = None
        self.facts: dict[str, Any] = {}
        self._ready: list[float] = []
        self._first: TimedRun | None = None
        self._runs: list[TimedRun] = []

    def start(self) -> None:
        """Start the process and wait until the model is loaded."""
        with self._recording_failure():
            process = ParticipantProcess(self.participant, self._job, threads=self._threads)
            self._process = process
            self._ready.append(process.ready_seconds)
            if process.prepared is not None:
                self.facts["prepare_seconds"] = process.prepared
            self.facts["versions"] = dict(process.ready.get("versions", {}))
            self.facts["precision"] = process.ready.get("precision", "")
            self.facts["file_bytes"] = process.ready.get("bytes")

    def run(self, *, counted: bool) -> None:
        """Run the request once."""
        with self._recording_failure():
            assert self._process is not None
            run = self._process.run(self._meters)
            if counted:
                self._runs.append(run)
            self._first = self._first or run
            self._raise_peak("peak_memory", self._process.peak_memory or None)
            self._raise_peak("device_memory", self._process.device_memory)

    def stop(self) -> None:
        """End the process, if one is running."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _raise_peak(self, key: str, value: int | None) -> None:
        if value is not None:
            self.facts[key] = max(value, self.facts.get(key, 0))

    @contextmanager
    def _recording_failure(self) -> Iterator[None]:
        """Record an error of the block and end the process."""
        try:
            yield
        except BackendError as error:
            self.failure = error
            self.stop()

    @property
    def picture(self) -> Array | None:
        """Images of the last run; None after a failure."""
        path = self._job.with_suffix(".npy")
        if self.failure is not None or not path.exists():
            return None
        picture: Array = np.load(path)
        return picture

    @property
    def runs(self) -> Sequence[TimedRun]:
        """Timed runs; none after a failure."""
        return () if self.failure else self._runs

    def result(self, reference: "_Runner") -> BenchResult:
        """Return the measurements, relative to the reference."""
        facts: dict[str, Any] = {"name": self.participant.name, "role": self.participant.role}
        facts["device"] = self.participant.placement.device
        facts |= {"ready_seconds": tuple(self._ready), **self.facts}
        if self.failure is not None:
            return BenchResult(**facts, **self._failure_fields(self.failure))
        distance = _psnr(reference.picture, self.picture)
        speed_class = self._speed_class(distance, reference)
        return BenchResult(
            **facts,
            speed_class=speed_class,
            gate=self.participant.gate if speed_class == "B" else "",
            first=self._first,
            runs=tuple(self._runs),
            psnr=None if self is reference else distance,
            median=medians(self._runs),
            ratio=paired_speedups(reference.runs, self._runs) if reference.runs else {},
        )

    def _speed_class(
        self, distance: float | None, reference: "_Runner"
    ) -> Literal["A", "B"] | None:
        """Return A for the reference's image, within the accuracy of the lower precision."""
        if not self.participant.same_trajectory:
            return "B"
        if distance is None:
            return None
        precisions = (runner.facts.get("precision", "") for runner in (self, reference))
        return "A" if distance >= min(map(engine_psnr, precisions)) else "B"

    def _failure_fields(self, failure: BackendError) -> dict[str, Any]:
        if isinstance(failure, MissingError):
            return {"status": "missing", "message": f"{failure}; {self.participant.install}"}
        return {"status": "failed", "message": str(failure)}


def _psnr(reference: Array | None, picture: Array | None) -> float | None:
    if reference is None or picture is None or reference.shape != picture.shape:
        return None
    return psnr(reference, picture, peak=2.0)


def _run_loaded(runners: Sequence[_Runner], repeats: int, progress: Progress) -> None:
    """Load all models, then interleave their runs; the first run of each is not counted."""
    with ExitStack() as stack:
        for runner in runners:
            stack.callback(runner.stop)
            with progress.part(f"{runner.participant.name}: load"):
                runner.start()
        for index in range(repeats + 1):
            for runner in runners:
                if runner.failure is None:
                    with progress.part(f"{runner.participant.name}: image"):
                        runner.run(counted=index > 0)


def _run_restarted(runners: Sequence[_Runner], repeats: int, progress: Progress) -> None:
    """Load one model at a time; the first run after each start is not counted."""
    for _ in range(repeats):
        for runner in runners:
            if runner.failure is None:
                _start_run_stop(runner, progress)


def _start_run_stop(runner: _Runner, progress: Progress) -> None:
    try:
        with progress.part(f"{runner.participant.name}: load"):
            runner.start()
        for counted in (False, True):
            if runner.failure is None:
                with progress.part(f"{runner.participant.name}: image"):
                    runner.run(counted=counted)
    finally:
        runner.stop()


def _measured(runners: Sequence[_Runner]) -> Measured:
    pictures = {runner.participant.name: runner.picture for runner in runners}
    return Measured(
        entries=tuple(runner.result(runners[0]) for runner in runners),
        pictures={name: picture for name, picture in pictures.items() if picture is not None},
    )
