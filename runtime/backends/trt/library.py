"""What building and running TensorRT engines have in common: sizes, signatures, the log."""

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

from latentforge.runtime.backends import (
    CACHE,
)
from latentforge.runtime.errors import BackendError, SettingsError
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import Shapes
from latentforge.runtime.tensor import TensorSpec

__all__ = [
    "CHOICES",
    "RTX",
    "Log",
    "Profile",
    "Signature",
    "buffer_sizes",
    "byte_count",
    "check_links",
    "check_signature",
    "dtype_of",
    "implemented",
    "profiles",
    "ranges",
    "sizes_of",
    "write_cache",
]

RTX = "tensorrt-rtx"
CHOICES = {
    "hardware_compatible": {"same": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"},
    "kernels": {"lazy": "LAZY", "eager": "EAGER", "none": "NONE"},
}
_DTYPES = {
    "BOOL": "bool",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "HALF": "float16",
    "FLOAT": "float32",
}
_NOISE = re.compile(r"--- \w+ node ---|While parsing node|catchCudaError")
_PLACE = re.compile(r"^(ERROR: )?\w+\.cpp:\d+:? | In \w+ at \S+?:\d+")
Signature = dict[str, tuple[str, tuple[int, ...]]]
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class Log:
    """Keeps the errors that a library logs, for the message of ours."""

    def __init__(self, library: Any) -> None:
        self._lines: deque[str] = deque(maxlen=100)
        self._worst = int(library.ILogger.Severity.ERROR)
        self.sink = implemented(library.ILogger, log=self._take)

    def _take(self, severity: Any, message: str) -> None:
        text = _PLACE.sub("", " ".join(message.split()))
        if int(severity) <= self._worst and not _NOISE.search(text):
            self._lines.append(text)

    def said(self) -> str:
        """The first two errors since the last call, of which others are the consequence."""
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return "; ".join(dict.fromkeys(line[:400] for line in lines[:2]))


def implemented(interface: Any, **functions: Callable[..., Any]) -> Any:
    """An object of a library's interface with these functions as methods."""

    def begin(self: Any) -> None:
        interface.__init__(self)

    methods = {name: staticmethod(function) for name, function in functions.items()}
    return type(interface.__name__, (interface,), {"__init__": begin, **methods})()


def profiles(component: Component) -> tuple[Profile, ...]:
    """The least, usual and most of every input's shape, for each of the component's shapes.

    Raises:
        SettingsError: nothing says how large a free dimension is.
    """
    return tuple(
        {
            name: (spec.resolve(least), spec.resolve(usual), spec.resolve(most))
            for name, spec in component.inputs.items()
        }
        for least, usual, most in map(sizes_of, ranges(component))
    )


def ranges(component: Component) -> tuple[Shapes, ...]:
    """One range for each free dimension, as often as there are profiles."""
    ranges = component.shapes or ({},)
    for name in component.free_dimensions:
        if any(name not in shapes for shapes in ranges):
            raise SettingsError(
                f"{component.file}: nothing says how large its {name} is, which "
                f"{component.backend} has to know: give a range, or export with fixed sizes"
            )
    return ranges


def sizes_of(shapes: Shapes) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """The least, usual and most of every dimension."""
    return (
        {name: allowed.min for name, allowed in shapes.items()},
        {name: allowed.opt for name, allowed in shapes.items()},
        {name: allowed.max for name, allowed in shapes.items()},
    )


def buffer_sizes(component: Component) -> dict[str, int]:
    """The most bytes that each input and output takes, of all profiles."""
    most = [sizes_of(shapes)[2] for shapes in ranges(component)]
    specs = {**component.inputs, **component.outputs}
    return {name: max(byte_count(spec, sizes) for sizes in most) for name, spec in specs.items()}


def byte_count(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    return math.prod(spec.resolve(sizes)) * np.dtype(spec.dtype).itemsize


def check_links(directory: Path) -> None:
    """Refuse links that lead out of a directory: the parser would read weights through them."""
    inside = directory.resolve()
    for path in directory.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise BackendError(
                f"{path} is a link to a file outside of {directory}, which may hold anything: "
                "put the file itself there, or take the link away"
            )


def check_signature(what: str, specs: Mapping[str, TensorSpec], found: Signature) -> None:
    """Refuse tensors that are not what the manifest says.

    Args:
        what: where they were found, and whether they are inputs or outputs.
        found: dtype and shape by name; -1 stands for a size that is free.
    """
    if specs.keys() != found.keys():
        raise BackendError(
            f"{what}s are {', '.join(found) or 'none'}, and the manifest says {', '.join(specs)}: "
            "export again"
        )
    for name, (dtype, shape) in found.items():
        spec = specs[name]
        alike = dtype == spec.dtype and len(shape) == len(spec.shape)
        pairs = zip(shape, spec.shape, strict=False)
        if not alike or any(-1 != size != want for size, want in pairs if isinstance(want, int)):
            raise BackendError(
                f"{what} {name} is {dtype}{list(shape)}, and the manifest says {spec}: export again"
            )


def dtype_of(kind: Any) -> str:
    name = str(kind.name)
    return _DTYPES.get(name, name.lower())


def write_cache(path: Path, content: Any) -> None:
    """Replace a cache as a whole, where its directory can be written; nobody depends on it."""
    with suppress(OSError):
        handle, name = tempfile.mkstemp(suffix=CACHE, dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
