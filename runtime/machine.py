"""Processor of this machine, the threads to take, and the memory in use."""

import os
import platform
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from mmap import PAGESIZE
from pathlib import Path

from latentforge.runtime.errors import SettingsError

__all__ = [
    "MAX_THREADS",
    "THREADS_VARIABLE",
    "CPU_INSTRUCTIONS",
    "MemoryMeter",
    "available_memory",
    "cpu_flags",
    "cpu_instructions",
    "cpu_name",
    "data_memory",
    "default_threads",
    "peak_memory",
    "resident_memory",
    "total_memory",
]

THREADS_VARIABLE = "LATENTFORGE_THREADS"
"""Environment variable with the threads of engines that are given no number of their own."""

MAX_THREADS = 256

CPU_INSTRUCTIONS: Mapping[str, str] = {
    **{"amx_bf16": "AMX-BF16", "amx_int8": "AMX-INT8", "avx512_bf16": "AVX512-BF16"},
    **{"avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "avx512f": "AVX-512", "avx2": "AVX2"},
    **{"sve": "SVE", "bf16": "BF16", "i8mm": "I8MM", "asimd": "NEON"},
}
"""Instruction sets that decide how fast a model runs, by the flag that Linux lists."""

_METER_SECONDS = 0.2

_DATA = 5  # place in /proc/self/statm of the pages of data and stacks


def cpu_name() -> str:
    """Return the model name of the processor, or its architecture if the system has no name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Return the features of the first processor, as Linux names them; none on another system."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def cpu_instructions() -> tuple[str, ...]:
    """Return the CPU_INSTRUCTIONS of this processor, the most powerful first."""
    flags = cpu_flags()
    return tuple(name for flag, name in CPU_INSTRUCTIONS.items() if flag in flags)


def default_threads() -> int:
    """Return the threads of an engine that is given none: LATENTFORGE_THREADS, or 0 for all cores.

    Raises:
        SettingsError: the variable is not a number of threads.
    """
    given = os.environ.get(THREADS_VARIABLE, "")
    numbers = {str(number): number for number in range(1, MAX_THREADS + 1)} | {"": 0}
    if given not in numbers:
        raise SettingsError(
            f"{THREADS_VARIABLE} is {given!r}: unset it, or give a number from 1 to {MAX_THREADS}"
        )
    return numbers[given]


def available_memory() -> int | None:
    """Return the bytes of memory that are available to programs; None if unknown."""
    return _memory("meminfo", "MemAvailable")


def total_memory() -> int | None:
    """Return the bytes of memory of this machine; None if unknown."""
    return _memory("meminfo", "MemTotal")


def peak_memory(pid: int | None = None) -> int:
    """Return the peak resident set of a process in bytes; this process if pid is None.

    On Linux from /proc, because getrusage there starts from the parent's figure. On other systems
    the figure of another process is unavailable, and 0 is returned.
    """
    if (peak := _memory(f"{pid or 'self'}/status", "VmHWM")) is not None:
        return peak
    if pid is not None:
        return 0
    import resource  # not on Windows, where nothing is measured

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Return the resident set of this process in bytes; 0 if unknown."""
    return _memory("self/status", "VmRSS") or 0


def data_memory() -> int | None:
    """Return the bytes of private writable memory that this process has mapped; None if unknown.

    Takes a few microseconds, since it is called before each run of an engine.
    """
    with suppress(OSError, IndexError):  # another system
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(256).split()[_DATA]) * PAGESIZE
    return None


def _memory(file: str, field: str) -> int | None:
    """Return a field of a file in /proc in bytes; None if there is none."""
    with suppress(OSError, KeyError):  # another system, or a process that has ended
        text = Path("/proc", file).read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines())
        return int(fields[field].split()[0]) * 1024
    return None


class MemoryMeter:
    """Thread that follows the memory of this process and its descendants, in a ``with`` block.

    Attributes:
        peak: largest sum of their resident sets in bytes so far; that of this process alone where
            the system has no /proc. Pages that processes share count in each.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> "MemoryMeter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.peak = max(self.peak, _tree_memory())
            if self._stopped.wait(_METER_SECONDS):
                return


def _tree_memory() -> int:
    """Return the sum of the resident sets of this process and its descendants in bytes."""
    pids, total = [os.getpid()], 0
    while pids:
        pid = pids.pop()
        total += _memory(f"{pid}/status", "VmRSS") or 0
        pids += _children(pid)
    return total or peak_memory()


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started; none where the system does not list them."""
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            children += map(int, file.read_text().split())
    return children
