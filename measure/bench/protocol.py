"""One participant: what it is asked, the process that serves it, and what it answers.

A participant is a program whose last argument is the file of a BenchJob. It writes a JSON object a line
to standard output, and nothing else:

    {"missing": "why"}                     a library isn't installed; it ends
    {"prepared": seconds}                  it has just turned the checkpoint into files of its own
    {"ready": {"versions": {}, "precision": "fp32", "bytes": N}}
    {"total": seconds, "stages": {"denoiser": [seconds of each call]}}     for every line it is given
    {"error": "why"}                       in place of any of these; it ends

A stage that it cannot tell is left out. The picture is in the job's file before it answers.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from latentforge.measure.results import TimedRun
from latentforge.runtime.equivalence import same_trajectory
from latentforge.runtime.errors import BackendError
from latentforge.runtime.machine import Meter, device_memory, joules, peak_memory
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.profiling import Timings
from latentforge.runtime.record import Record
from latentforge.runtime.settings import Settings

__all__ = ["Participant", "BenchJob", "MissingError", "Process"]

_PATIENCE = 3600.0  # seconds without an answer
_WORKER = (sys.executable, "-m", "latentforge.measure.bench.worker")
_ENDING = 5.0  # seconds to end by itself


class MissingError(BackendError):
    """A participant's libraries aren't installed."""


class BenchJob(Record, frozen=True, kw_only=True):
    """What a participant is asked.

    Attributes:
        model: an engine directory, or a checkpoint in diffusers' layout.
        picture: the .npy file to leave the last picture in, (n, 3, height, width) in -1..1.
        noise: a .npy file of the noise to start from, (n, channels, h, w) of unit variance; it is
            what torch draws of the seed.
        folder: the participant's own, kept between its starts.
        scheduler: the diffusers class that the sampler follows (``name``), and what to give its
            from_config beside the checkpoint's own (``options``).
    """

    model: str
    settings: Settings
    threads: int
    picture: str
    noise: str = ""
    folder: str = ""
    scheduler: Mapping[str, Any] = {}

    @classmethod
    def read(cls, path: str) -> "BenchJob":
        """Read the file that write() made."""
        return msgspec.json.decode(Path(path).read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        """Write it for a participant's process."""
        path.write_bytes(msgspec.json.encode(self))


@dataclass(frozen=True, kw_only=True)
class Participant:
    """A name, and the program that serves a model under it.

    Attributes:
        command: the program up to the job's file.
        same_trajectory: whether it is meant to draw the reference's picture; else it is class B however
            near it comes.
        gate: what its pictures have been measured to be, if they are others than the reference's.
        plan: settings of its own in place of the common ones, which draw another picture.
        install: what to do where it is missing.
    """

    name: str
    command: tuple[str, ...]
    model: str
    role: Literal["reference", "peer", "ours"] = "peer"
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    same_trajectory: bool = True
    gate: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    install: str = ""

    @property
    def is_engines(self) -> bool:
        """Whether its model is an engine directory."""
        return self.command == _WORKER

    @classmethod
    def of(cls, engines: Path, name: str = "", *, plain: bool = False) -> "Participant":
        """An engine directory, under its own name unless another is given.

        It follows the plan of its manifest, if there is one, unless it is to be plain.
        """
        manifest = Manifest.read(engines, hashes=False)
        plan = {} if manifest.acceleration is None or plain else manifest.acceleration.request
        return cls(
            name=name or engines.resolve().name,
            command=_WORKER,
            model=str(engines),
            role="ours",
            same_trajectory=same_trajectory(manifest) and not plan,
            gate=_gate(manifest, planned=bool(plan)),
            plan=plan,
        )


def _gate(manifest: Manifest, *, planned: bool) -> str:
    """What the manifest says of the pictures that its last stage, or its plan, has compared."""
    figures = manifest.quality.get("image", {})
    if planned and manifest.acceleration is not None:
        figures = manifest.acceleration.measured
    shown = (f"{name} {value:.4g}" for name, value in figures.items())
    return f"passed its gate: {', '.join(shown)}" if figures else ""


class Process:
    """The parent's side of a participant's process, started and ready; close() ends it.

    Attributes:
        ready: what it said when it had loaded.
        ready_seconds: from its start to that, less what it took to convert its checkpoint.
        prepared: seconds that this took, if it was done now.

    Raises:
        MissingError: its libraries aren't installed.
        BackendError: it failed; the message has its last words.
    """

    def __init__(
        self, participant: Participant, job: Path, *, threads: int, patience: float = _PATIENCE
    ) -> None:
        self._log = job.with_suffix(".log")
        self._patience = patience
        self.prepared: float | None = None
        start = time.perf_counter()
        self._process = _started([*participant.command, str(job)], self._log, threads)
        try:
            answer = self._answer()
            if "prepared" in answer:
                self.prepared = float(answer["prepared"])
                answer = self._answer()
            self.ready: Mapping[str, Any] = self._checked(answer, "ready")["ready"]
        except BaseException:
            self.close()
            raise
        self.ready_seconds = time.perf_counter() - start - (self.prepared or 0.0)

    def close(self) -> None:
        """End it, and what it started: compilers of torch.compile, for one."""
        _end(self._process)

    @property
    def peak_memory(self) -> int:
        """Bytes resident at most, so far."""
        return peak_memory(self._process.pid)

    @property
    def device_memory(self) -> int | None:
        """Bytes that it holds on GPUs."""
        return device_memory(self._process.pid)

    def run(self, meters: Sequence[Meter]) -> TimedRun:
        """Ask for one picture and measure what it took.

        Raises:
            BackendError: it failed; the message has its last words.
        """
        before = [meter.read() for meter in meters]
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"run\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer that is missing says why
        answer = self._checked(self._answer(), "total")
        spent = [meter.since(value) for meter, value in zip(meters, before, strict=True)]
        stages = {name: tuple(calls) for name, calls in answer.get("stages", {}).items()}
        return TimedRun(seconds=_seconds(Timings(stages, answer["total"])), joules=joules(spent))

    def _checked(self, answer: Mapping[str, Any], wanted: str) -> Mapping[str, Any]:
        if "missing" in answer:
            raise MissingError(str(answer["missing"]))
        if "error" in answer or wanted not in answer:
            raise BackendError(str(answer.get("error", f"it answered {answer}, not {wanted}")))
        return answer

    def _answer(self) -> Mapping[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], self._patience)[0]:
            raise BackendError(f"no answer within {self._patience:g} s")
        line = out.readline()
        if not line:
            raise BackendError(self._last_words())
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise BackendError(f"it wrote what is no answer: {line[:200]!r}")
        return answer

    def _last_words(self) -> str:
        """Why it ended, as far as can be told."""
        status = self._process.wait(_ENDING)
        if status == -signal.SIGKILL:
            return "killed by the system, as happens when memory runs out"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        words = lines[-1] if lines else "without a word"
        by = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended ({status})"
        return f"{by}: {words[:300]}"


def _seconds(timings: Timings) -> dict[str, float]:
    """The stages of one run; what engines don't account for is the sampler's, if they are known."""
    if "denoiser" not in timings.stages:
        return {**{k: sum(v) for k, v in timings.stages.items()}, "total": timings.total}
    return {**timings.seconds, "denoiser step": timings.step, "total": timings.total}


def _started(command: Sequence[str], log: Path, threads: int) -> subprocess.Popen[bytes]:
    """In a group of its own, so that it can be ended whole."""
    process = None
    try:
        with log.open("w") as errors, _undisturbed():
            process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
            )
        return process
    except OSError as error:
        raise BackendError(f"{command[0]} does not start: {error.strerror}") from error
    except BaseException:
        if process is not None:
            _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let interrupts wait: one that hits Popen leaves a process that nobody has a handle of."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main one
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda which, _: came.append(which)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
    for one in came[:1]:
        signal.raise_signal(one)
