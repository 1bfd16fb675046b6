"""Process of one participant, as its parent starts, drives and ends it."""

import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from latentforge.measure.bench.protocol import Participant
from latentforge.measure.energy import EnergyMeter, total_joules
from latentforge.measure.hardware import device_memory
from latentforge.measure.results import TimedRun
from latentforge.runtime.cleanups import at_forced_end
from latentforge.runtime.errors import BackendError
from latentforge.runtime.isolation import child_environment
from latentforge.runtime.machine import peak_memory
from latentforge.runtime.process import kill, parse_message
from latentforge.runtime.timings import Timings

__all__ = ["MissingError", "ParticipantProcess"]

_TIMEOUT = 3600.0  # seconds for one answer
_EXIT_TIMEOUT = 5.0  # seconds from the end of its output to its exit


class MissingError(BackendError):
    """Error for a participant whose libraries are not installed."""


class ParticipantProcess:
    """Running process of a participant that has loaded its model; close() ends it.

    Attributes:
        ready: content of its ``ready`` message.
        ready_seconds: time from its start to that message, without ``prepared``.
        prepared: seconds that it spent to convert the checkpoint, if it did so now.

    Raises:
        MissingError: the participant's libraries are not installed.
        BackendError: the participant failed; the message ends with its last line of output.
    """

    def __init__(
        self, participant: Participant, job: Path, *, threads: int, timeout: float = _TIMEOUT
    ) -> None:
        self._log = job.with_suffix(".log")
        self._timeout = timeout
        self.prepared: float | None = None
        start = time.perf_counter()
        self._process = _start([*participant.command, str(job)], self._log, threads)
        self._registered = ExitStack()
        self._registered.enter_context(at_forced_end(lambda: kill(self._process, group=True)))
        try:
            answer = self._answer()
            if "prepared" in answer:
                self.prepared = float(answer["prepared"])
                answer = self._answer()
            self.ready: Mapping[str, Any] = _checked(answer, "ready")["ready"]
        except BaseException:
            self.close()
            raise
        self.ready_seconds = time.perf_counter() - start - (self.prepared or 0.0)

    def close(self) -> None:
        """End the process and its children, such as the compilers of torch.compile."""
        _kill(self._process)
        self._registered.close()

    @property
    def peak_memory(self) -> int:
        """Peak resident set so far, in bytes."""
        return peak_memory(self._process.pid)

    @property
    def device_memory(self) -> int | None:
        """Current GPU memory in bytes; None without a GPU."""
        return device_memory(self._process.pid)

    def run(self, meters: Sequence[EnergyMeter]) -> TimedRun:
        """Run the job's request once and return its times and energy.

        Raises:
            BackendError: the participant failed; the message ends with its last line of output.
        """
        before = [meter.read() for meter in meters]
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then the missing answer carries the reason
            self._process.stdin.write(b"run\n")
            self._process.stdin.flush()
        answer = _checked(self._answer(), "total")
        spent = [meter.since(value) for meter, value in zip(meters, before, strict=True)]
        stages = {name: tuple(calls) for name, calls in answer.get("stages", {}).items()}
        seconds = _stage_seconds(Timings(stages, answer["total"]))
        return TimedRun(seconds=seconds, joules=total_joules(spent))

    def _answer(self) -> Mapping[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], self._timeout)[0]:
            raise BackendError(f"no answer within {self._timeout:g} s")
        line = out.readline()
        if not line:
            raise BackendError(self._exit_reason())
        answer = parse_message(line)
        if answer is None:
            raise BackendError(f"wrote {line[:200]!r} to standard output, not a JSON object")
        return answer

    def _exit_reason(self) -> str:
        """Return why the process ended, from its exit status and the end of its log."""
        status = self._process.wait(_EXIT_TIMEOUT)
        if status == -signal.SIGKILL:
            return "killed by the system, which happens when memory runs out"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        if status < 0:
            return f"ended by {signal.Signals(-status).name}: {last[:300]}"
        return f"exited with status {status}: {last[:300]}"


def _checked(answer: Mapping[str, Any], expected: str) -> Mapping[str, Any]:
    if "missing" in answer:
        raise MissingError(str(answer["missing"]))
    if "error" in answer or expected not in answer:
        raise BackendError(str(answer.get("error", f"answered {answer}, expected {expected!r}")))
    return answer


def _stage_seconds(timings: Timings) -> dict[str, float]:
    """Return the seconds of one run by stage; ``sampler`` is the rest, if all stages are timed."""
    if "denoiser" not in timings.stages:
        return {**{k: sum(v) for k, v in timings.stages.items()}, "total": timings.total}
    return {**timings.seconds, "denoiser step": timings.step, "total": timings.total}


def _start(command: Sequence[str], log: Path, threads: int) -> subprocess.Popen[bytes]:
    """Start a program in its own process group, so that its children can be ended with it."""
    process = None
    try:
        with log.open("w") as errors, _deferred_signals():
            process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**child_environment(), "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
            )
        return process
    except OSError as error:
        raise BackendError(f"cannot start {command[0]}: {error.strerror}") from error
    except BaseException:
        if process is not None:
            _kill(process)
        raise


def _kill(process: subprocess.Popen[bytes]) -> None:
    kill(process, group=True)
    process.communicate()


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Defer interrupts to the end of the block.

    An interrupt within Popen would leave a process behind whose handle is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals
        return
    pending: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda came, _: pending.append(came)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
    for received in pending[:1]:
        handler = handlers[numbers.index(received)]
        if callable(handler):  # not raised again, which would count as a second signal
            handler(received, None)
        else:
            signal.raise_signal(received)
