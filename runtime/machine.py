"""Properties of this machine, and the memory in use."""

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
    "describe_machine",
    "device_memory",
    "fit_together",
    "gpus",
    "nvml",
    "peak_memory",
    "resident_memory",
]

_MEMORY_PER_BYTE = 3  # memory of a process that runs a model, per byte of its files


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the model name of the processor, or its architecture if the system has no name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, str]:
    """Return a description of this machine for readers of measurements, by property."""
    properties = {
        "cpu": cpu_name(),
        "cores": str(available_cores()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if total := _meminfo("MemTotal"):
        properties["memory"] = f"{total / 2**30:.0f} GB"
    if names := [name for _, name in gpus()]:
        properties["gpu"] = ", ".join(names)
    return properties


def available_memory() -> int | None:
    """Return the bytes of memory that are available to programs; None if unknown."""
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int | None:
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def fit_together(sizes: Sequence[int]) -> bool | None:
    """Return True if models fit into free memory together, False if only one at a time does.

    Args:
        sizes: bytes of the files of each model.

    Returns:
        None if the largest model does not fit.
    """
    free = (available_memory() or math.inf) / _MEMORY_PER_BYTE
    return None if max(sizes) > free else sum(sizes) < free


def peak_memory(pid: int | None = None) -> int:
    """Return the peak resident set of a process in bytes; this process if pid is None.

    On Linux from /proc, because getrusage there starts from the parent's figure. On other systems
    the figure of another process is unavailable, and 0 is returned.
    """
    if (peak := _status("VmHWM", pid)) is not None:
        return peak
    if pid is not None:
        return 0
    import resource  # not on Windows, where nothing is measured

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory() -> int:
    """Return the resident set of this process in bytes; 0 if unknown."""
    return _status("VmRSS") or 0


def _status(field: str, pid: int | None = None) -> int | None:
    with suppress(OSError, KeyError):  # another process may have ended
        text = Path(f"/proc/{pid or 'self'}/status").read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines())
        return int(fields[field].split()[0]) * 1024
    return None


@functools.cache
def nvml() -> Any:
    """Return NVIDIA's management library (package nvidia-ml-py); None without a GPU."""
    with suppress(Exception):  # not installed, or no driver
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
    """Return the bytes that a process holds on all GPUs; None without a GPU."""
    library = nvml()
    if library is None:
        return None
    held = 0
    for handle, _ in gpus():
        for process in library.nvmlDeviceGetComputeRunningProcesses(handle):
            held += (process.usedGpuMemory or 0) if process.pid == pid else 0
    return held
