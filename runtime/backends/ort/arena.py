"""Memory that ONNX Runtime keeps between runs on the CPU.

All sessions of a process share one arena: an image's engines run one after the other, so that each
uses the memory of those before it, where arenas of their own would add up.

The library frees memory of an arena only at the end of a run, and only whole regions of it, each as
large as the first tensor in it: one small output in use can keep a gigabyte. Outputs are copied
before, and the run is that of a graph that does nothing.
"""

import functools
import threading

import numpy as np
import onnxruntime as ort

from latentforge.runtime.backends import return_memory
from latentforge.runtime.backends.ort.ort_session import LOG_NOTHING

__all__ = ["return_arena", "share_arena"]

_AS_REQUESTED = 1  # strategy of growth: regions of the sizes that are needed, which can be freed
_LOCK = threading.Lock()
_NOTHING = (
    b"\x08\x08\x3a\x2e\x0a\x10\x0a\x01x\x12\x01y\x22\x08Identity"
    b"\x12\x00\x5a\x0b\x0a\x01x\x12\x06\x0a\x04\x08\x01\x12\x00"
    b"\x62\x0b\x0a\x01y\x12\x06\x0a\x04\x08\x01\x12\x00\x42\x04\x0a\x00\x10\x11"
)
"""ONNX graph that returns a number. The library frees memory of the arena only after a run."""


def share_arena(settings: ort.SessionOptions) -> None:
    """Let a session use the arena of the process, if its settings have one at all."""
    if settings.enable_cpu_mem_arena:
        _user()
        _set_shared(settings)


def return_arena() -> None:
    """Return to the system what no session uses."""
    settings = ort.RunOptions()
    settings.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    _user().run(None, {"x": np.zeros((), np.float32)}, settings)
    return_memory()


def _user() -> ort.InferenceSession:
    """Return the session of the arena that frees its memory; the first call makes both."""
    with _LOCK:
        return _made()


@functools.cache
def _made() -> ort.InferenceSession:
    kind, memory = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    place = ort.OrtMemoryInfo("Cpu", kind, 0, memory)
    growth = ort.OrtArenaCfg({"arena_extend_strategy": _AS_REQUESTED})
    ort.create_and_register_allocator(place, growth)
    settings = ort.SessionOptions()
    settings.log_severity_level = LOG_NOTHING
    settings.intra_op_num_threads = 1  # the caller's
    _set_shared(settings)
    return ort.InferenceSession(_NOTHING, settings, providers=["CPUExecutionProvider"])


def _set_shared(settings: ort.SessionOptions) -> None:
    settings.add_session_config_entry("session.use_env_allocators", "1")
