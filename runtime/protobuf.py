"""Fields of protobuf messages, read without a schema and without loading their contents.

A message is a sequence of numbered fields, some of which are messages again. Wire types:
https://protobuf.dev/programming-guides/encoding/.
"""

import mmap
from collections.abc import Iterator

__all__ = ["Span", "fields", "find"]

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
_MAX_KEY = 1 << 32  # libraries keep 32 bits, and would see another field in a larger number

Span = tuple[int, int]
"""Start and end of a message or a string, in bytes."""


def find(data: mmap.mmap, span: Span, *path: int) -> list[Span]:
    """Return the spans of all fields that a path of field numbers leads to."""
    spans = [span]
    for number in path:
        spans = [inner for outer in spans for key, inner in fields(data, outer) if key == number]
    return spans


def fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span]]:
    """Yield number and content of the length-delimited fields of a message: messages and strings.

    ValueError or IndexError means that the bytes are not a protobuf message.
    """
    position, end = span
    while position < end:
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if not 0 < number or key >= _MAX_KEY:
            raise ValueError("a field has no valid number")
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
