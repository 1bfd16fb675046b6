"""Cores, memory and GPUs of this machine: for readers of measurements, and to plan them."""

import functools
import math
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from latentforge.runtime.machine import (
    available_memory,
    cpu_instructions,
    cpu_name,
    default_threads,
    total_memory,
)

__all__ = [
    "available_cores",
    "available_threads",
    "describe_machine",
    "device_memory",
    "fit_together",
    "gpus",
    "nvml",
]

_MEMORY_PER_BYTE = 3  # memory of a process that runs a model, per byte of its files


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_threads() -> int:
    """Return the threads of a participant that is given none: LATENTFORGE_THREADS, or all cores."""
    return default_threads() or available_cores()


def describe_machine() -> dict[str, str]:
    """Return a description of this machine for readers of measurements, by property."""
    properties = {
        "cpu": cpu_name(),
        "cores": str(available_cores()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if instructions := cpu_instructions():
        properties["instructions"] = ", ".join(instructions)
    if total := total_memory():
        properties["memory"] = f"{total / 2**30:.0f} GB"
    if names := [name for _, name in gpus()]:
        properties["gpu"] = ", ".join(names)
    return properties


def fit_together(sizes: Sequence[int]) -> bool | None:
    """Return True if models fit into free memory together, False if only one at a time does.

    Args:
        sizes: bytes of the files of each model.

    Returns:
        None if the largest model does not fit.
    """
    free = (available_memory() or math.inf) / _MEMORY_PER_BYTE
    return None if max(sizes) > free else sum(sizes) < free


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
