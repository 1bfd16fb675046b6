"""Inputs of an ONNX file, read from the file's header without loading the graph.

An ONNX file is a protobuf message: a sequence of numbered fields, some of which are messages again.
Field numbers are those of onnx.proto, wire types those of
https://protobuf.dev/programming-guides/encoding/. Fields that are not on the way to the inputs are
skipped, so that reading takes no time however large the weights are. Opening a session instead
would need kernels for every operator, and the onnx package is no dependency of the runtime.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

__all__ = ["input_dimensions"]

_MODEL_GRAPH, _GRAPH_INPUT = 7, 11
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_PARAM = 1, 2, 1, 2, 1, 2
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10

_Span = tuple[int, int]


def input_dimensions(onnx: Path) -> list[tuple[str, list[str]]]:
    """Return name and dimensions of each input of an ONNX file; none if it is not one.

    A dimension is the name of its free size, or "" if it is a number or unknown.
    """
    try:
        with onnx.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model = (0, len(data))
            return [_input(data, span) for span in _find(data, model, _MODEL_GRAPH, _GRAPH_INPUT)]
    except (OSError, ValueError, IndexError):
        return []


def _input(data: mmap.mmap, span: _Span) -> tuple[str, list[str]]:
    path = (_VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM)
    dimensions = [_text(data, dim, _DIM_PARAM) for dim in _find(data, span, *path)]
    return _text(data, span, _VALUE_NAME), dimensions


def _text(data: mmap.mmap, span: _Span, number: int) -> str:
    """Return the string in a field of a message; of several, the last counts."""
    spans = _find(data, span, number)
    return data[slice(*spans[-1])].decode() if spans else ""


def _find(data: mmap.mmap, span: _Span, *path: int) -> list[_Span]:
    """Return the spans of all fields that a path of field numbers leads to."""
    spans = [span]
    for number in path:
        spans = [inner for outer in spans for key, inner in _fields(data, outer) if key == number]
    return spans


def _fields(data: mmap.mmap, span: _Span) -> Iterator[tuple[int, _Span]]:
    """Yield number and content of the length-delimited fields of a message: messages and strings.

    ValueError or IndexError means that the bytes are not a protobuf message.
    """
    position, end = span
    while position < end:
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _LENGTH_DELIMITED:
            size, position = _varint(data, position)
            if position + size > end:
                raise ValueError("a field ends after its message")
            yield number, (position, position + size)
            position += size
        elif wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type in _FIXED_BYTES:
            position += _FIXED_BYTES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type} is not used by ONNX")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """Return a number in groups of seven bits, the lowest first, and the position after it."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            return value, position + index + 1
    raise ValueError("a number has more than 10 bytes")
