"""Check of an ONNX graph before a library reads it: the files that it names, and its bounds.

Weights of tensors may lie in other files, which a library would open by itself: those of
initializers, of attributes and in subgraphs. All of them have to be files of the component, which
the manifest lists with their hashes. Graphs that open files by other means (EPContext, stored
session settings) are refused, as are those of no bound: see graph_bounds.py. Field numbers are
those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.manifest.graph_bounds import UnboundedGraphError, check_part
from latentforge.runtime.manifest.graph_walk import walk
from latentforge.runtime.protobuf import Reader, Span, TooManyFieldsError

if TYPE_CHECKING:  # the manifest imports this module
    from latentforge.runtime.manifest import Component

__all__ = ["check_graph"]

_WORDS = (b"location", b"EPContext", b"ort_config")
"""Words without one of which a file names no other file, even if it is no ONNX graph."""

_ENTRY_KEY, _ENTRY_VALUE, _OP_TYPE = 1, 2, 4
_UNBOUNDED = (TooManyFieldsError, UnboundedGraphError)


def check_graph(directory: Path, component: Component) -> None:
    """Check that an ONNX graph names no file besides those of its component.

    Raises:
        ManifestError: it does, or its file cannot be read.
    """
    path = directory / component.file
    listed = {entry.file for entry in component.data}
    _check_suffix(path, component, listed)
    if path.suffix.lower() != ".onnx":
        return
    folder = PurePosixPath(component.file).parent
    for name in _named_files(path):
        pure = PurePosixPath(name)
        inside = ".." not in pure.parts and not pure.is_absolute()
        if not inside or (folder / pure).as_posix() not in listed:
            raise ManifestError(
                f"{path} names the file {name!r}, which the manifest does not list as its data: "
                "export again"
            )


def _check_suffix(path: Path, component: Component, listed: Collection[str]) -> None:
    """Check that a library takes a file for what its backend says, and finds its weights listed."""
    backend = component.backend
    suffix = ".xml" if backend == "openvino" else ".onnx"
    if backend.startswith(("onnxruntime", "openvino")) and path.suffix.lower() != suffix:
        raise ManifestError(f"{path} does not end in {suffix}, as graphs of {backend} do")
    weights = PurePosixPath(component.file).with_suffix(".bin").as_posix()
    if backend == "openvino" and weights not in listed:
        raise ManifestError(f"{path} has weights in {weights}, which its data does not list")


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
    except _UNBOUNDED as error:
        raise ManifestError(f"{path} is no graph of an engine: {error}; export again") from error
    except (ValueError, IndexError) as error:
        raise ManifestError(f"{path} is no ONNX graph ({error}): export again") from error


def _names_in(data: mmap.mmap) -> set[str]:
    """Return the files that a graph names: weights in it are skipped, not read."""
    try:
        return set(_names(Reader(data)))
    except _UNBOUNDED:
        raise
    except (ValueError, IndexError):
        if any(data.find(word) >= 0 for word in _WORDS):
            raise
        return set()


def _names(reader: Reader) -> Iterator[str]:
    """Yield the files that the messages of a graph name, and check the sizes that they declare."""
    for part in walk(reader):
        check_part(reader, part)
        strings = part.message.spans
        if part.kind == "external" and b"location" in _texts(reader, strings[_ENTRY_KEY]):
            values = _texts(reader, strings[_ENTRY_VALUE])
            yield from (value.decode(errors="replace") for value in values)
        elif part.kind == "metadata" and b"ort_config" in _texts(reader, strings[_ENTRY_KEY]):
            yield "ort_config"  # settings of a session, among them paths
        elif part.kind == "node" and b"EPContext" in _texts(reader, strings[_OP_TYPE]):
            yield "EPContext"  # the file of a vendor's engine, which no backend here makes


def _texts(reader: Reader, spans: Sequence[Span]) -> list[bytes]:
    return [reader.content(span) for span in spans]
