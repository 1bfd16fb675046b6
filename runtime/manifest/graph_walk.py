"""Walk of the messages of an ONNX file: graphs in it, their nodes, tensors and types.

Field numbers are those of onnx.proto.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from latentforge.runtime.protobuf import Message, Reader

__all__ = ["Part", "walk"]

_PARTS: Mapping[str, Mapping[int, str]] = {
    "model": {
        **{7: "graph", 8: "entry", 14: "metadata", 20: "training", 25: "function", 26: "entry"},
    },
    "training": {1: "graph", 2: "graph", 3: "entry", 4: "entry"},
    "graph": {
        **{1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value"},
        **{14: "annotation", 15: "sparse", 16: "entry"},
    },
    "function": {7: "node", 9: "entry", 11: "attribute", 12: "value", 14: "entry"},
    "node": {5: "attribute", 9: "entry", 10: "devices"},
    "attribute": {
        **{5: "tensor", 10: "tensor", 22: "sparse", 23: "sparse"},
        **{6: "graph", 11: "graph", 14: "type", 15: "type"},
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {3: "entry", 13: "external", 16: "entry"},
    "annotation": {2: "entry"},
    "value": {2: "type", 4: "entry"},
    "type": {1: "array", 4: "sequence", 5: "map", 7: "entry", 8: "array", 9: "sequence"},
    "sequence": {1: "type"},
    "map": {2: "type"},
    "array": {2: "shape"},
    "shape": {1: "entry"},
    "devices": {2: "sharding"},
    "sharding": {3: "entry", 4: "sharded"},
    "sharded": {2: "entry"},
}
"""Messages in a message, by field number; an entry has none."""

_DEPTH = 100  # of messages in messages; protobuf itself reads no more


class Part(NamedTuple):
    """Message in an ONNX file.

    Attributes:
        kind: name of the message's type, as in the table of this module.
        message: its fields.
        above: the message that it is in; None for the whole file.
    """

    kind: str
    message: Message
    above: Message | None


def walk(reader: Reader) -> Iterator[Part]:
    """Yield every message of an ONNX file, each before those in it.

    Weights are skipped, not read. ValueError or IndexError: see Reader; or the messages are nested
    too deeply.
    """
    above: Message | None = None
    waiting = [("model", reader.root, above, 0)]
    while waiting:
        kind, span, above, depth = waiting.pop()
        if depth > _DEPTH:
            raise ValueError("it is nested too deeply")
        message = reader.message(span)
        yield Part(kind, message, above)
        for number, inner in _PARTS.get(kind, {}).items():
            spans = message.spans.get(number, ())
            waiting += [(inner, each, message, depth + 1) for each in spans]
