"""Files that an ONNX graph names, which a library would open by itself.

Weights of tensors may lie in other files: those of initializers, of sparse ones, of attributes, in
subgraphs and in functions. All of them have to be files of the component, which the manifest lists
with their hashes. Graphs that open files by other means (EPContext, stored session settings) are
refused. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.protobuf import Span, fields, find

if TYPE_CHECKING:  # the manifest imports this module
    from latentforge.runtime.manifest import Component

__all__ = ["check_graph"]

_WORDS = (b"location", b"EPContext", b"ort_config")
"""Words without one of which a file names no other file, even if it is no ONNX graph."""

_MODEL = {7: "graph", 25: "function", 20: "training", 14: "metadata"}
_GRAPH = {1: "node", 5: "tensor", 15: "sparse"}
_PARTS: Mapping[str, Mapping[int, str]] = {
    "model": _MODEL,
    "training": {1: "graph", 2: "graph"},
    "graph": _GRAPH,
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        **{5: "tensor", 10: "tensor", 22: "sparse", 23: "sparse"},
        **{6: "graph", 11: "graph"},
    },
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Messages in a message, by field number."""

_DEPTH = 100  # of messages in messages; protobuf itself reads no more
_TENSOR_EXTERNAL, _ENTRY_KEY, _ENTRY_VALUE, _OP_TYPE = 13, 1, 2, 4


def check_graph(directory: Path, component: Component) -> None:
    """Check that an ONNX graph names no file besides those of its component.

    Raises:
        ManifestError: it does, or its file cannot be read.
    """
    path = directory / component.file
    if path.suffix.lower() != ".onnx":
        if component.backend.startswith("onnxruntime"):
            raise ManifestError(f"{path} does not end in .onnx, as graphs of onnxruntime do")
        return
    folder = PurePosixPath(component.file).parent
    listed = {entry.file for entry in component.data}
    for name in _named_files(path):
        pure = PurePosixPath(name)
        inside = ".." not in pure.parts and not pure.is_absolute()
        if not inside or (folder / pure).as_posix() not in listed:
            raise ManifestError(
                f"{path} names the file {name!r}, which the manifest does not list as its data: "
                "export again"
            )


def _named_files(path: Path) -> set[str]:
    """Return the files that a graph names; none for a file of something else."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                return set()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _names_in(data)
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, IndexError) as error:
        raise ManifestError(f"{path} is no ONNX graph ({error}): export again") from error


def _names_in(data: mmap.mmap) -> set[str]:
    """Return the files that a graph names: weights in it are skipped, not read."""
    try:
        return set(_names(data, (0, len(data)), "model", 0))
    except (ValueError, IndexError):
        if any(data.find(word) >= 0 for word in _WORDS):
            raise
        return set()


def _names(data: mmap.mmap, span: Span, kind: str, depth: int) -> Iterator[str]:
    """Yield the files that a message of a kind names, and those in its parts."""
    if depth > _DEPTH:
        raise ValueError("it is nested too deeply")
    if kind == "tensor":
        yield from _locations(data, span)
    elif kind == "metadata" and b"ort_config" in _texts(data, span, _ENTRY_KEY):
        yield "ort_config"  # settings of a session, among them paths
    elif kind == "node" and b"EPContext" in _texts(data, span, _OP_TYPE):
        yield "EPContext"  # the file of a vendor's engine, which no backend here makes
    parts = _PARTS.get(kind, {})
    for number, inner in fields(data, span) if parts else ():
        if number in parts:
            yield from _names(data, inner, parts[number], depth + 1)


def _locations(data: mmap.mmap, span: Span) -> Iterator[str]:
    for entry in find(data, span, _TENSOR_EXTERNAL):
        if b"location" in _texts(data, entry, _ENTRY_KEY):
            values = _texts(data, entry, _ENTRY_VALUE)
            yield from (value.decode(errors="replace") for value in values)


def _texts(data: mmap.mmap, span: Span, number: int) -> list[bytes]:
    return [data[slice(*inner)] for inner in find(data, span, number)]
