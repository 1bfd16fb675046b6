"""Processor of this machine, and the memory in use."""

import platform
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["available_memory", "cpu_name", "peak_memory", "resident_memory", "total_memory"]


def cpu_name() -> str:
    """Return the model name of the processor, or its architecture if the system has no name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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


def _memory(file: str, field: str) -> int | None:
    """Return a field of a file in /proc in bytes; None if there is none."""
    with suppress(OSError, KeyError):  # another system, or a process that has ended
        text = Path("/proc", file).read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines())
        return int(fields[field].split()[0]) * 1024
    return None
