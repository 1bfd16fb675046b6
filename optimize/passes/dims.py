"""Symbolic dimensions: compare sizes in a graph whose batch, height and width are free."""

from collections.abc import Callable, Mapping

import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.matching import scalar

__all__ = ["Dim", "dim", "dim_values"]

Dim = int | str | tuple[ir.Value, int]
"""One dimension: a number, a name, or an index into a tensor if neither is known.

A name stands for the same number everywhere in a graph. The index is an axis of a tensor of
unknown shape, or an element of a one-dimensional tensor of sizes.
"""

_MAX_SIZES = 8
"""Elements that a tensor of sizes has at most; larger constants are not read."""


def dim(value: ir.Value, axis: int) -> Dim:
    """Return one dimension of a value; a negative axis counts from the last."""
    if value.shape is not None:
        axis %= len(value.shape)
        entry = value.shape[axis]
        if isinstance(entry, int):
            return entry
        if entry.value is not None:
            return str(entry.value)
    return (value, axis)


def dim_values(value: ir.Value | None) -> list[Dim] | None:
    """Return the elements of a tensor of sizes as dimensions.

    Such a tensor is the target of a Reshape, say: a constant, or computed by Shape, Concat,
    Slice and Gather.

    Returns:
        One dimension per element, or None if the tensor is not a list of sizes.
    """
    if value is None:
        return None
    if (tensor := ir.convenience.get_const_tensor(value)) is not None:
        array = constant(value) if tensor.size <= _MAX_SIZES and len(tensor.shape) <= 1 else None
        whole = array is not None and array.dtype.kind == "i"
        return list(array.reshape(-1).tolist()) if whole and array is not None else None
    node = value.producer()
    compute = _EVALUATORS.get(node.op_type) if node is not None and node.domain == "" else None
    result = compute(node) if compute is not None and node is not None else None
    return result if result is not None else _opaque(value)


def _opaque(value: ir.Value) -> list[Dim] | None:
    """Return the elements of a tensor that is computed in some other way, by their index."""
    if value.shape is None or len(value.shape) > 1:
        return None
    length = value.shape[0] if len(value.shape) else 1
    return [(value, index) for index in range(length)] if isinstance(length, int) else None


def _shape(node: ir.Node) -> list[Dim] | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    axes = range(len(value.shape))
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(axes))
    return [dim(value, axis) for axis in axes[start:end]]


def _concat(node: ir.Node) -> list[Dim] | None:
    parts = [dim_values(value) for value in node.inputs]
    return None if None in parts else [item for part in parts if part for item in part]


def _slice(node: ir.Node) -> list[Dim] | None:
    items = dim_values(node.inputs[0])
    numbers = [scalar(value) for value in node.inputs[1:]]
    if items is None or None in numbers or numbers[2:] not in ([], [0], [0, 1]):
        return None
    start, end = (int(number or 0) for number in numbers[:2])
    return items[start:end]


def _gather(node: ir.Node) -> list[Dim] | None:
    items, indices = dim_values(node.inputs[0]), dim_values(node.inputs[1])
    if items is None or indices is None or node.attributes.get_int("axis", 0) != 0:
        return None
    numbers = [index for index in indices if isinstance(index, int)]
    return [items[number] for number in numbers] if len(numbers) == len(indices) else None


def _unchanged(node: ir.Node) -> list[Dim] | None:
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) != ir.DataType.INT64:
        return None
    return dim_values(node.inputs[0])


_EVALUATORS: Mapping[str, Callable[[ir.Node], list[Dim] | None]] = {
    "Shape": _shape,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "Identity": _unchanged,
    "Cast": _unchanged,
    "Squeeze": _unchanged,
    "Unsqueeze": _unchanged,
    "Reshape": _unchanged,
}
