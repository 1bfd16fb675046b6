"""Averages of what flows through a graph, taken in the graph itself over recorded inputs."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import add_constant, open_session
from latentforge.optimize.prune.slicing import size
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.tensor import Feeds

__all__ = ["clone", "grams", "mean_squares", "need_feeds"]

Array = NDArray[np.float64]


def need_feeds(feeds: Sequence[Feeds], what: str) -> None:
    """Refuse to score without inputs.

    Raises:
        SettingsError: there are none.
    """
    if not feeds:
        raise SettingsError(f"{what} needs recorded inputs and got none; calibrate with some")


def clone(model: ir.Model) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A copy of a model to build on, and its values by name; they share their weights."""
    copy = model.clone()
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    return copy, values | {str(value.name): value for value in copy.graph.inputs}


def mean_squares(
    model: ir.Model, axes: Mapping[str, int], feeds: Sequence[Feeds]
) -> dict[str, Array]:
    """By value, the mean of its squares in each channel over all feeds.

    Args:
        model: stays as it is.
        axes: by name of a value, its axis of channels.
        feeds: what to run on.
    """
    copy, values = clone(model)
    for name, axis in axes.items():
        value = values[name]
        shape = value.shape
        assert shape is not None
        others = [i for i in range(len(shape)) if i != axis % len(shape)]
        square = _add(copy, "Mul", [value, value])
        indices = add_constant(copy.graph, np.array(others, np.int64), f"{name}_axes")
        mean = _add(copy, "ReduceMean", [square, indices], keepdims=0)
        _output(copy, mean, name)
    return _run(copy, list(axes), feeds)


def grams(model: ir.Model, heads: Mapping[str, int], feeds: Sequence[Feeds]) -> dict[str, Array]:
    """By value, the mean over all tokens and feeds of each head's outer product with itself.

    Args:
        model: stays as it is.
        heads: by name of a value (batch, tokens, heads * size), its number of heads.
        feeds: what to run on.

    Returns:
        Arrays (heads, size, size).
    """
    copy, values = clone(model)
    for name, count in heads.items():
        value = values[name]
        sizes = np.array([-1, count, size(value, -1) // count])
        parts = add_constant(copy.graph, sizes, f"{name}_split")
        split = _add(copy, "Reshape", [value, parts])
        tall = _add(copy, "Transpose", [split], perm=[1, 2, 0])
        wide = _add(copy, "Transpose", [split], perm=[1, 0, 2])
        first = add_constant(copy.graph, np.array(0, np.int64), f"{name}_first")
        tokens = _add(copy, "Gather", [_add(copy, "Shape", [split]), first])
        total = _add(copy, "MatMul", [tall, wide])
        mean = _add(copy, "Div", [total, _add(copy, "CastLike", [tokens, total])])
        _output(copy, mean, name)
    return _run(copy, list(heads), feeds)


def _add(model: ir.Model, op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes)  # type: ignore[arg-type]
    model.graph.append(node)
    return node.outputs[0]


def _output(model: ir.Model, value: ir.Value, name: str) -> None:
    value.name = f"{name}_statistics"
    value.dtype = ir.DataType.FLOAT
    model.graph.outputs.append(value)


def _run(model: ir.Model, names: list[str], feeds: Sequence[Feeds]) -> dict[str, Array]:
    """The average of each value's statistics over feeds."""
    if not names:
        return {}
    outputs = [f"{name}_statistics" for name in names]
    totals: list[Array] = []
    session = open_session(model)
    for fed in feeds:
        found = [np.asarray(array, np.float64) for array in session.run(outputs, dict(fed))]
        totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    return {name: total / len(feeds) for name, total in zip(names, totals, strict=True)}
