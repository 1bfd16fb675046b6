"""Averages of activation statistics over recorded inputs, computed inside the graph."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import add_constant, open_session
from latentforge.optimize.prune.slicing import size
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.tensor import Feeds

__all__ = ["check_feeds", "head_gram_matrices", "mean_squares"]

Array = NDArray[np.float64]


def check_feeds(feeds: Sequence[Feeds], purpose: str) -> None:
    """Check that there are recorded inputs for scores.

    Raises:
        SettingsError: feeds is empty.
    """
    if not feeds:
        raise SettingsError(f"{purpose} needs recorded inputs and got none; calibrate with some")


def _clone(model: ir.Model) -> tuple[ir.Model, dict[str, ir.Value]]:
    """Return a copy of a model that shares its weights, and the copy's values by name."""
    copy = model.clone()
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    return copy, values | {str(value.name): value for value in copy.graph.inputs}


def mean_squares(
    model: ir.Model, axes: Mapping[str, int], feeds: Sequence[Feeds]
) -> dict[str, Array]:
    """Return the mean square of each channel over all feeds.

    Args:
        model: the graph, which is not changed.
        axes: channel axis by name of a value.
        feeds: recorded inputs of the graph.

    Returns:
        (channels,) by name of a value.
    """
    copy, values = _clone(model)
    for name, axis in axes.items():
        value = values[name]
        shape = value.shape
        assert shape is not None
        reduced = [i for i in range(len(shape)) if i != axis % len(shape)]
        square = _add(copy, "Mul", [value, value])
        indices = add_constant(copy.graph, np.array(reduced, np.int64), f"{name}_axes")
        mean = _add(copy, "ReduceMean", [square, indices], keepdims=0)
        _output(copy, mean, name)
    return _run(copy, list(axes), feeds)


def head_gram_matrices(
    model: ir.Model, heads: Mapping[str, int], feeds: Sequence[Feeds]
) -> dict[str, Array]:
    """Return each head's uncentered covariance E[o o'] over all tokens and feeds.

    Args:
        model: the graph, which is not changed.
        heads: number of heads by name of a value (batch, tokens, heads * size).
        feeds: recorded inputs of the graph.

    Returns:
        (heads, size, size) by name of a value.
    """
    copy, values = _clone(model)
    for name, count in heads.items():
        value = values[name]
        sizes = np.array([-1, count, size(value, -1) // count])
        shape = add_constant(copy.graph, sizes, f"{name}_split")
        split = _add(copy, "Reshape", [value, shape])  # (tokens, heads, size)
        columns = _add(copy, "Transpose", [split], perm=[1, 2, 0])
        rows = _add(copy, "Transpose", [split], perm=[1, 0, 2])
        first = add_constant(copy.graph, np.array(0, np.int64), f"{name}_first")
        tokens = _add(copy, "Gather", [_add(copy, "Shape", [split]), first])
        total = _add(copy, "MatMul", [columns, rows])
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
    """Run the model on every feed, and return the average of each value's statistic."""
    if not names:
        return {}
    outputs = [f"{name}_statistics" for name in names]
    totals: list[Array] = []
    session = open_session(model)
    for feed in feeds:
        arrays = [np.asarray(array, np.float64) for array in session.run(outputs, dict(feed))]
        totals = [a + b for a, b in zip(totals, arrays, strict=True)] if totals else arrays
    return {name: total / len(feeds) for name, total in zip(names, totals, strict=True)}
