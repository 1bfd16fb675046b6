"""Inputs of an ONNX file, read from the file's header without loading the graph.

Field numbers are those of onnx.proto. Fields that are not on the way to the inputs are
skipped, so that reading takes no time however large the weights are. Opening a session instead
would need kernels for every operator, and the onnx package is no dependency of the runtime.
"""

import mmap
from pathlib import Path

from latentforge.runtime.protobuf import Reader, Span

__all__ = ["input_dimensions"]

_MODEL_GRAPH, _GRAPH_INPUT = 7, 11
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_PARAM = 1, 2, 1, 2, 1, 2


def input_dimensions(onnx: Path) -> list[tuple[str, list[str]]]:
    """Return name and dimensions of each input of an ONNX file; none if it is not one.

    A dimension is the name of its free size, or "" if it is a number or unknown.
    """
    try:
        with onnx.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = Reader(data)
            inputs = reader.find(reader.root, _MODEL_GRAPH, _GRAPH_INPUT)
            return [_input(reader, span) for span in inputs]
    except (OSError, ValueError, IndexError):
        return []


def _input(reader: Reader, span: Span) -> tuple[str, list[str]]:
    path = (_VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM)
    dimensions = [_text(reader, dim, _DIM_PARAM) for dim in reader.find(span, *path)]
    return _text(reader, span, _VALUE_NAME), dimensions


def _text(reader: Reader, span: Span, number: int) -> str:
    """Return the string in a field of a message; of several, the last counts."""
    spans = reader.find(span, number)
    return reader.content(spans[-1]).decode() if spans else ""
