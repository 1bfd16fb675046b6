"""Bounds of an ONNX graph: how much a library has to allocate for it, and how long it runs.

A file of a few bytes may declare a tensor of terabytes, repeat a graph 2^62 times, or call
functions that call functions. No stage writes any of these. Field numbers are those of onnx.proto.
"""

from math import prod

from latentforge.runtime.manifest.graph_walk import Part
from latentforge.runtime.protobuf import Message, Reader

__all__ = ["UnboundedGraphError", "check_part"]

_DIMS, _EXTERNAL = 1, 13
_RAW, _STRINGS = 9, 6
_PACKED = (5, 7, 11)  # integers of variable length
_DATA = (4, *_PACKED, 10, _RAW)
_PER_BYTE = 8  # numbers: elements of 2 bits, and integers of one byte
_MAX_RANK = 64
_INTS, _GRAPHS, _OP_TYPE = 8, (6, 11), 4


class UnboundedGraphError(ValueError):
    """Graph whose size or duration has no bound."""


def check_part(reader: Reader, part: Part) -> None:
    """Refuse a message that makes a library allocate or run without bound.

    Raises:
        UnboundedGraphError: it does.
        ValueError: see Reader.
    """
    match part.kind:
        case "tensor":
            _check_tensor(reader, part.message)
        case "sparse":
            raise UnboundedGraphError("it has a sparse tensor, of which no size is known")
        case "function":
            raise UnboundedGraphError("it defines functions: have its exporter inline them")
        case "attribute":
            _check_attribute(reader, part)


def _check_tensor(reader: Reader, tensor: Message) -> None:
    """Check that a tensor has the bytes that its dims need, unless they are in another file."""
    for number in _PACKED:
        for span in tensor.spans.get(number, ()):
            reader.count_packed(span)
    dims = [*tensor.numbers.get(_DIMS, ())]
    for span in tensor.spans.get(_DIMS, ()):
        dims += reader.packed(span)
    if len(dims) > _MAX_RANK:
        raise UnboundedGraphError(f"a tensor has {len(dims)} dimensions")
    if _EXTERNAL not in tensor.spans and prod(dims) > _elements(tensor):
        raise UnboundedGraphError(f"a tensor of dims {dims[:8]} has less data than that")


def _elements(tensor: Message) -> int:
    """Return the most elements that the data in a tensor's message may hold."""
    bytes_ = sum(end - start for number in _DATA for start, end in tensor.spans.get(number, ()))
    single = sum(len(tensor.numbers.get(number, ())) for number in _DATA)
    return bytes_ * _PER_BYTE + single + len(tensor.spans.get(_STRINGS, ()))


def _check_attribute(reader: Reader, part: Part) -> None:
    for span in part.message.spans.get(_INTS, ()):
        reader.count_packed(span)
    if part.above is not None and any(number in part.message.spans for number in _GRAPHS):
        operators = part.above.spans.get(_OP_TYPE, ())
        names = b" ".join(reader.content(span) for span in operators).decode(errors="replace")
        if names != "If":
            raise UnboundedGraphError(
                f"its operator {names[:60]!r} repeats a graph, without a bound"
            )
