"""Processes of the stages, which end with everything that they started, and the GPU's memory."""

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from background import start_process

__all__ = ["StageProcess", "peak_memory"]

_MARK = "LATENTFORGE_GPU_RUN"
_KILL_SECONDS = 10.0  # a process that waits in a driver cannot be ended
_SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class StageProcess:
    """Process of a stage; its mark is in the environment of every process that comes from it."""

    process: "subprocess.Popen[bytes]"
    mark: str

    @classmethod
    def start(
        cls, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> "StageProcess":
        """Start a command whose output is added to a log."""
        mark = uuid.uuid4().hex
        process = start_process(command, log, {**environment, _MARK: mark})
        return cls(process, mark)

    @property
    def is_running(self) -> bool:
        """Return True until the process has ended."""
        return self.process.poll() is None

    def wait(self, seconds: float) -> int | None:
        """Return the exit status, or None if the process has not ended by then."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> int:
        """End all of its processes, whatever session they are in; return how many are left."""
        deadline = time.monotonic() + _KILL_SECONDS
        if self.is_running:
            os.killpg(self.process.pid, signal.SIGKILL)
        while (found := self._pids()) and time.monotonic() < deadline:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)
        self.wait(0.1)
        return len(found)

    def _pids(self) -> list[int]:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if self._is_marked(pid)]

    def _is_marked(self, pid: int) -> bool:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False
        return f"{_MARK}={self.mark}".encode() in variables


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Context manager that samples the MiB in use on the GPU; nothing without nvidia-smi."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS) and (used := _used()) is not None:
            samples.append(used)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _used() -> int | None:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=9)
        return int(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
