"""What this machine is, what it has free, and what it spends."""

import functools
import math
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = [
    "available_cores",
    "available_memory",
    "cpu_name",
    "described",
    "device_memory",
    "fit_together",
    "gpus",
    "nvml",
    "peak_memory",
    "resident_memory",
]

_MEMORY = 3  # times its files, which is what a process takes that paints with them


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


def described() -> dict[str, str]:
    """The machine in words, for people who read figures that were taken on it."""
    words = {
        "cpu": cpu_name(),
        "cores": str(available_cores()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if total := _meminfo("MemTotal"):
        words["memory"] = f"{total / 2**30:.0f} GB"
    if names := [name for _, name in gpus()]:
        words["gpu"] = ", ".join(names)
    return words


def available_memory() -> int | None:
    """Bytes that programs can still get, where the system tells."""
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int | None:
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def fit_together(sizes: Sequence[int]) -> bool | None:
    """Whether models of so many bytes can all be loaded at once; None if not even one can."""
    free = (available_memory() or math.inf) / _MEMORY
    return None if max(sizes) > free else sum(sizes) < free


def peak_memory(pid: int | None = None) -> int:
    """Bytes of memory a process has held at most (peak resident set): this one, unless named.

    On Linux from /proc, since getrusage there starts from the parent's figure. Elsewhere another
    process' figure is not to be had, and 0.
    """
    if (peak := _status("VmHWM", pid)) is not None:
        return peak
    if pid is not None:
        return 0
    import resource  # not on Windows, which we do not measure

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Bytes of memory this process holds now; 0 where the system does not tell."""
    return _status("VmRSS") or 0


def _status(field: str, pid: int | None = None) -> int | None:
    with suppress(OSError, KeyError):  # another process may just have ended
        text = Path(f"/proc/{pid or 'self'}/status").read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines())
        return int(fields[field].split()[0]) * 1024
    return None


@functools.cache
def nvml() -> Any:
    """Return NVIDIA's management library, of the package nvidia-ml-py; None without a GPU."""
    with suppress(Exception):  # whatever is missing, there is nothing to ask
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    return None


def gpus() -> list[tuple[Any, str]]:
    """Return the NVML handle and the name of every NVIDIA GPU."""
    library = nvml()
    if library is None:
        return []
    handles = map(library.nvmlDeviceGetHandleByIndex, range(library.nvmlDeviceGetCount()))
    return [(handle, str(library.nvmlDeviceGetName(handle))) for handle in handles]


def device_memory(pid: int) -> int | None:
    """Bytes that a process holds now on all GPUs; None where there are none."""
    library = nvml()
    if library is None:
        return None
    held = 0
    for handle, _ in gpus():
        for process in library.nvmlDeviceGetComputeRunningProcesses(handle):
            held += (process.usedGpuMemory or 0) if process.pid == pid else 0
    return held
