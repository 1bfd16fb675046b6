"""Limits of the memory that a library may take while it loads an engine or runs it.

A small file can make a library allocate gigabytes, by a constant of a large shape, for example: its
allocation fails then, which ends in an error, where the system would end the process.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import TMonitor

from latentforge.runtime.machine import data_memory

try:
    import resource
except ImportError:  # Windows: no limit
    resource = None  # type: ignore[assignment]

__all__ = ["limited_memory", "load_memory", "run_memory"]

_BASE = 1 << 29  # for code that a library generates, and its buffers
_PER_CORE = 32 << 20  # stacks of a library's threads
_ANY = _BASE + _PER_CORE * (os.cpu_count() or 1)  # of any engine
_PER_BYTE = 16  # weights of four bits become floats, and a copy of them in the layout of kernels
_PER_ELEMENT = 1 << 16  # a hundred channels in some layers at a time

_IDLE = ("interrupts", "memory", "progress")  # threads that need next to no memory


def load_memory(weights: int, copies: int = 1) -> int:
    """Return the most bytes that loading needs, beside those of any engine.

    Args:
        weights: bytes of the engine's files.
        copies: graphs that the library makes of them.
    """
    return _PER_BYTE * weights * max(1, copies)


def run_memory(elements: int) -> int:
    """Return the most bytes that a run needs, beside those of any engine.

    Args:
        elements: of all inputs and outputs. Attention takes the square of them at most.
    """
    return _PER_ELEMENT * elements + elements**2


@contextmanager
def limited_memory(needed: int) -> Iterator[None]:
    """Let allocations fail in a block that go beyond `needed` bytes, and what any engine needs.

    The limit is the process's: it has none while other Python threads run, which may need memory
    themselves, nor on a system that does not count a process's data. Threads of a command that
    only wait or display are no such threads.
    """
    present = data_memory() if resource is not None and _is_alone() else None
    if present is None:
        yield
        return
    allowed = present + needed + _ANY
    old, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (old, hard, allowed) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(*limits, (1 << 63) - 1), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (old, hard))


def _is_alone() -> bool:
    """Return True if no other thread runs Python code that may need memory."""
    others = [each for each in threading.enumerate() if each is not threading.current_thread()]
    return all(each.name in _IDLE or isinstance(each, TMonitor) for each in others)
