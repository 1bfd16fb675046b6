"""Shared by building and running TensorRT engines: profiles, signatures, the log, files."""

import math
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from latentforge.runtime.backends import CACHE, check_ranges
from latentforge.runtime.cleanups import at_forced_end
from latentforge.runtime.errors import BackendError
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import Shapes
from latentforge.runtime.tensor import TensorSpec

__all__ = [
    "CHOICES",
    "RTX",
    "Log",
    "Profile",
    "buffer_sizes",
    "byte_count",
    "check_links",
    "dtype_of",
    "implement",
    "profile_sizes",
    "profiles",
    "ranges",
    "write_cache",
]

RTX = "tensorrt-rtx"
CHOICES = {
    "hardware_compatible": {"same": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"},
    "kernels": {"lazy": "LAZY", "eager": "EAGER", "none": "NONE"},
}
_DTYPES = {"half": "float16", "float": "float32"}
"""Numpy's names of data types that the libraries call otherwise."""

_NOISE = re.compile(r"--- \w+ node ---|While parsing node|catchCudaError")
_PLACE = re.compile(r"^(ERROR: )?\w+\.cpp:\d+:? | In \w+ at \S+?:\d+")
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class Log:
    """Collector of the errors that the library logs, for our own messages."""

    def __init__(self, library: Any) -> None:
        self._lines: deque[str] = deque(maxlen=100)
        self._max_severity = int(library.ILogger.Severity.ERROR)
        self.sink = implement(library.ILogger, log=self._record)

    def _record(self, severity: Any, message: str) -> None:
        text = _PLACE.sub("", " ".join(message.split()))
        if int(severity) <= self._max_severity and not _NOISE.search(text):
            self._lines.append(text)

    def take_errors(self) -> str:
        """Return the first two errors since the last call; later ones are consequences of them."""
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return "; ".join(dict.fromkeys(line[:400] for line in lines[:2]))


def implement(interface: Any, **functions: Callable[..., Any]) -> Any:
    """Return an object that implements a library's interface by these functions."""

    methods: dict[str, Any] = {name: staticmethod(method) for name, method in functions.items()}
    methods["__init__"] = lambda self: interface.__init__(self)
    return type(interface.__name__, (interface,), methods)()


def profiles(component: Component) -> tuple[Profile, ...]:
    """Return (min, opt, max) of every input's shape, for each of the component's shapes."""
    inputs = component.inputs.items()
    return tuple(
        {name: (spec.resolve(low), spec.resolve(opt), spec.resolve(high)) for name, spec in inputs}
        for low, opt, high in map(profile_sizes, ranges(component))
    )


def ranges(component: Component) -> tuple[Shapes, ...]:
    """Return the ranges of each optimization profile; ShapeError if a free dimension has none."""
    check_ranges(component)
    return component.shapes or ({},)


def profile_sizes(shapes: Shapes) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return the min, opt and max size of every dimension."""
    items = shapes.items()
    return {n: r.min for n, r in items}, {n: r.opt for n, r in items}, {n: r.max for n, r in items}


def buffer_sizes(component: Component) -> dict[str, int]:
    """Return the largest size in bytes of each input and output over all profiles."""
    largest = [profile_sizes(shapes)[2] for shapes in ranges(component)]
    specs = {**component.inputs, **component.outputs}
    return {name: max(byte_count(spec, sizes) for sizes in largest) for name, spec in specs.items()}


def byte_count(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a tensor, given the size of each free dimension."""
    return math.prod(spec.resolve(sizes)) * np.dtype(spec.dtype).itemsize


def check_links(directory: Path) -> None:
    """Raise BackendError if a link leads out of a directory: weights would be read through it."""
    inside = directory.resolve()
    for path in directory.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise BackendError(
                f"{path} is a link to a file outside of {directory}, whose content is not "
                "checked: replace the link by the file, or remove it"
            )


def dtype_of(data_type: Any) -> str:
    """Return numpy's name of a library's data type; its own, in lower case, if numpy has none."""
    name = str(data_type.name).lower()
    return _DTYPES.get(name, name)


def write_cache(path: Path, content: Any) -> None:
    """Replace a cache file atomically; do nothing if its directory cannot be written."""
    with suppress(OSError):
        handle, name = tempfile.mkstemp(suffix=CACHE, dir=path.parent)
        try:
            with at_forced_end(lambda: os.unlink(name)):
                with open(handle, "wb") as file:
                    file.write(content)
                os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
