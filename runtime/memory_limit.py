"""Limit of the memory that a library may take while it reads an engine.

A small file can make a library allocate gigabytes, by a constant that it computes while it loads:
its allocation fails then, which ends in an error, where the system would end the process.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from latentforge.runtime.machine import data_memory

try:
    import resource
except ImportError:  # Windows: no limit
    resource = None  # type: ignore[assignment]

__all__ = ["limited_memory"]

_BASE = 1 << 30  # for a library's code that is generated, and its buffers
_PER_BYTE = 16  # weights of four bits become floats, and a copy of them in the layout of kernels
_PER_CORE = 32 << 20  # stacks of a library's threads
_IDLE = ("interrupts", "memory", "progress")  # threads that need next to no memory


@contextmanager
def limited_memory(weights: int, copies: int = 1) -> Iterator[None]:
    """Let allocations fail in a block that go far beyond what an engine needs.

    The limit is the process's: it has none while other Python threads run, which may need memory
    themselves, nor on a system that does not count a process's data. Threads that only wait or
    display, of a command, are no such threads.

    Args:
        weights: bytes of the engine's files.
        copies: graphs that the library makes of them.
    """
    needed = _BASE + _PER_BYTE * weights * max(1, copies) + _PER_CORE * (os.cpu_count() or 1)
    present = data_memory()
    if resource is None or present is None or _busy_threads() > 1:
        yield
        return
    old, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (old, hard, present + needed) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (old, hard))


def _busy_threads() -> int:
    return sum(thread.name not in _IDLE for thread in threading.enumerate())
