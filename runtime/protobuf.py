"""Fields of protobuf messages, read without a schema and without loading their contents.

A message is a sequence of numbered fields, some of which are messages again. Wire types:
https://protobuf.dev/programming-guides/encoding/.
"""

import mmap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Message", "Reader", "Span", "TooManyFieldsError"]

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
_MAX_KEY = 1 << 32  # libraries keep 32 bits, and would see another field in a larger number
_MAX_FIELDS = 1 << 20  # a library makes an object of some hundred bytes of two bytes
_PACKED_BYTES = 32  # of a list of numbers, which become eight bytes each, that count as a field

Span = tuple[int, int]
"""Start and end of a message or a string, in bytes."""


class TooManyFieldsError(ValueError):
    """A file has more fields than any graph of an engine."""


@dataclass(frozen=True)
class Message:
    """Fields of a message by their number, in the order of the file.

    Attributes:
        spans: of the length-delimited fields, which are messages, strings and lists of numbers.
        numbers: values of the others; 0 for those of fixed length.
    """

    spans: Mapping[int, Sequence[Span]]
    numbers: Mapping[int, Sequence[int]]


class Reader:
    """Reader of the messages in a file, of which it reads a bounded number of fields.

    ValueError or IndexError of any method means that the bytes are not a protobuf message, or that
    it has too many fields.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._left = _MAX_FIELDS

    @property
    def root(self) -> Span:
        """The whole file."""
        return 0, len(self._data)

    def message(self, span: Span) -> Message:
        """Return the fields of a message, which count."""
        spans: defaultdict[int, list[Span]] = defaultdict(list)
        numbers: defaultdict[int, list[int]] = defaultdict(list)
        position, end = span
        while position < end:
            self._count(1)
            number, wire_type, position = self._key(position)
            if wire_type == _LENGTH_DELIMITED:
                size, position = self._varint(position)
                if position + size > end:
                    raise ValueError("a field ends after its message")
                spans[number].append((position, position + size))
                position += size
            else:
                value, position = self._number(wire_type, position)
                numbers[number].append(value)
        return Message(spans, numbers)

    def find(self, span: Span, *path: int) -> list[Span]:
        """Return the spans of all fields that a path of field numbers leads to."""
        spans = [span]
        for number in path:
            spans = [
                inner for outer in spans for inner in self.message(outer).spans.get(number, ())
            ]
        return spans

    def packed(self, span: Span) -> list[int]:
        """Return a list of numbers of variable length, which counts by its bytes."""
        position, end = span
        self._count(end - position)
        values = []
        while position < end:
            value, position = self._varint(position)
            values.append(value)
        return values

    def count_packed(self, span: Span) -> None:
        """Count a list of numbers that is not read, a field for each 32 bytes."""
        self._count((span[1] - span[0]) // _PACKED_BYTES)

    def content(self, span: Span) -> bytes:
        """Return the bytes of a string."""
        return self._data[slice(*span)]

    def _count(self, fields: int) -> None:
        self._left -= fields
        if self._left < 0:
            raise TooManyFieldsError(f"it has more than {_MAX_FIELDS:,} fields")

    def _key(self, position: int) -> tuple[int, int, int]:
        """Return number and wire type of a field, and the position after them."""
        key, position = self._varint(position)
        if not 0 < key >> 3 or key >= _MAX_KEY:
            raise ValueError("a field has no valid number")
        return key >> 3, key & 7, position

    def _number(self, wire_type: int, position: int) -> tuple[int, int]:
        """Return the value of a field that is a number, and the position after it."""
        if wire_type == _VARINT:
            return self._varint(position)
        if wire_type not in _FIXED_BYTES:
            raise ValueError(f"wire type {wire_type} is not used by ONNX")
        return 0, position + _FIXED_BYTES[wire_type]

    def _varint(self, position: int) -> tuple[int, int]:
        """Return a number in groups of seven bits, the lowest first, and the position after it."""
        byte = self._data[position]
        if byte < 0x80:
            return byte, position + 1
        value = 0
        for index in range(_MAX_VARINT_BYTES):
            byte = self._data[position + index]
            value |= (byte & 0x7F) << (7 * index)
            if not byte & 0x80:
                return value, position + index + 1
        raise ValueError("a number has more than 10 bytes")
