"""Check of an OpenVINO IR before the library reads it.

The graph is XML, and names places of its weights in the file beside it. The library allocates what
the shapes of constants say, and repeats what loops say.
"""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any
from xml.parsers import expat

from latentforge.runtime.errors import BackendError
from latentforge.runtime.text import one_line

__all__ = ["check_ir"]

_MAX_BYTES = 256 << 20
_MAX_ELEMENTS = 1 << 20
_MAX_DEPTH = 64
_REPEATING = frozenset({"Loop", "TensorIterator"})
_BITS = re.compile(r"[a-z]+(\d+)(e\d+m\d+)?")
_NUMBERS = re.compile(r"\d{1,19}(\s*,\s*\d{1,19})*", re.ASCII)
_BYTE_TYPES = {"boolean", "char"}


def check_ir(path: Path, weights: Path) -> None:
    """Refuse a graph that needs more than its files have, or that has no bound.

    Args:
        path: the graph, an XML file.
        weights: the file with its weights.

    Raises:
        BackendError: it is damaged, too large, repeats a part, or has a constant outside of its
            weights.
        OSError: a file cannot be read.
    """
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise BackendError(f"{path} has {size >> 20} MiB, which no graph needs: compile it again")
    try:
        with path.open("rb") as file:
            _Elements(weights.stat().st_size).parser.ParseFile(file)
    except (expat.ExpatError, ValueError) as error:
        raise BackendError(
            f"openvino refuses {path}: {one_line(error)}: compile it again"
        ) from error


class _Elements:
    """Checks of the elements of a graph, in the order of the file."""

    def __init__(self, available: int) -> None:
        self._available = available
        self._count = self._depth = 0
        self.parser = expat.ParserCreate()
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end

    def _refuse(self, *_: Any) -> None:
        raise ValueError("it declares a document type")

    def _start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._count += 1
        self._depth += 1
        if self._count > _MAX_ELEMENTS or self._depth > _MAX_DEPTH:
            raise ValueError(f"it has over {_MAX_ELEMENTS} elements, or {_MAX_DEPTH} in another")
        if name == "layer" and attributes.get("type") in _REPEATING:
            raise ValueError(f"its {attributes['type']} repeats a graph, without a bound")
        if name == "data" and "offset" in attributes:
            _check_constant(attributes, self._available)

    def _end(self, _: str) -> None:
        self._depth -= 1


def _check_constant(attributes: Mapping[str, str], available: int) -> None:
    """Check that a constant lies in the weights, and has the bytes that its shape needs."""
    offset, size = (_number(attributes.get(key, "")) for key in ("offset", "size"))
    if offset + size > available:
        raise ValueError(f"a constant lies outside of its {available} bytes of weights")
    kind, shape = attributes.get("element_type", ""), _numbers(attributes.get("shape", ""))
    if kind != "string" and prod(shape) * _bits(kind) > 8 * size:
        raise ValueError(f"a constant of shape {shape[:8]} has {size} bytes")


def _number(text: str) -> int:
    numbers = _numbers(text)
    if len(numbers) != 1:
        raise ValueError(f"a constant has the place {text[:60]!r}")
    return numbers[0]


def _numbers(text: str) -> list[int]:
    """Return the numbers in a list with commas; none if it is empty, ValueError for others."""
    if not (stripped := text.strip()):
        return []
    if not _NUMBERS.fullmatch(stripped):
        raise ValueError(f"a constant has the numbers {stripped[:60]!r}")
    return [int(part) for part in stripped.split(",")]


def _bits(kind: str) -> int:
    match = _BITS.fullmatch(kind)
    if kind not in _BYTE_TYPES and match is None:
        raise ValueError(f"a constant has the type {kind[:60]!r}")
    return int(match[1]) if match else 8
