"""Fuse mean, deviation, variance and scale into one LayerNormalization.

Our own exporter, and torch's older one from opset 17 on, write LayerNormalization themselves. This
is for graphs of older opsets and of other exporters, also after a conversion to opset 18, which
made the axes of ReduceMean an input.
"""

from dataclasses import dataclass

import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.dims import Dim, dim
from latentforge.optimize.passes.matching import (
    Declined,
    find,
    input_at,
    is_channel_vector,
    producer_of,
    scalar,
    sole_consumer,
)
from latentforge.optimize.passes.rewriting import Editor, remove_unused

__all__ = ["fuse_layer_norm"]

_OPSET = 17  # the first with LayerNormalization


@dataclass(frozen=True, kw_only=True)
class _LayerNorm:
    """Matched layer normalization: its input, constants, and the node whose output is replaced."""

    x: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    epsilon: float
    last: ir.Node


def fuse_layer_norm(model: ir.Model) -> int:
    """Replace (x - mean) / sqrt(variance + epsilon) * scale [+ bias] over the last axis.

    ::

        x ─┬──────────── Sub ─┬─────────────────────────────────────────── Div ─ Mul ─ [Add] ─ y
           └─ ReduceMean ─┘   └─ Pow 2 ─ ReduceMean ─ Add epsilon ─ Sqrt ───┘     │       │
                                                                                scale    bias
     ->
        x, scale, [bias] ─ LayerNormalization (axis = -1, epsilon) ─ y

    Mul of the deviation by itself stands for Pow, and Mul by Reciprocal for Div.
    """
    editor, count = Editor(model.graph), 0
    if model.graph.opset_imports[""] < _OPSET:
        return 0
    for match in find(model.graph, _match, "Sqrt"):
        inputs = [match.x, match.scale, *([] if match.bias is None else [match.bias])]
        normed = editor.add(
            "LayerNormalization",
            inputs,
            before=match.last,
            shape=match.x.shape,
            attributes={"axis": -1, "epsilon": match.epsilon, "stash_type": 1},
        )
        editor.replace(match.last.outputs[0], normed)
        count += 1
    remove_unused(model)
    return count


def _match(sqrt: ir.Node) -> _LayerNorm | None:
    """Match the normalization around the Sqrt of a variance; None for any other Sqrt."""
    deviation = _deviation(sqrt)
    x = deviation.inputs[0] if deviation is not None else None
    if deviation is None or x is None:
        return None
    if x.dtype != ir.DataType.FLOAT:
        raise Declined(f"it computes in {x.dtype}, not in float32")
    normed = _quotient(sqrt, deviation.outputs[0])
    epsilon, channels = _epsilon(sqrt), dim(x, -1)
    scaled, scale = _applied(normed, "Mul", channels)
    if epsilon is None or scaled is None or scale is None:
        raise Declined("epsilon is no constant, or no constant scale per channel follows")
    shifted, bias = _applied(scaled, "Add", channels)
    return _LayerNorm(x=x, scale=scale, bias=bias, epsilon=epsilon, last=shifted or scaled)


def _deviation(sqrt: ir.Node) -> ir.Node | None:
    """Return the Sub of x and its mean, if a Sqrt is of its mean square and an epsilon."""
    shifted = producer_of(sqrt.inputs[0], "Add")
    for value in shifted.inputs if shifted is not None else ():
        variance = producer_of(value, "ReduceMean")
        square = producer_of(_reduced(variance), "Pow", "Mul")
        deviation = producer_of(square.inputs[0], "Sub") if square is not None else None
        if square is None or deviation is None:
            continue
        squares = square.inputs[1] is square.inputs[0] or scalar(square.inputs[1]) == 2
        multiplies = square.op_type == "Mul" and square.inputs[1] is not square.inputs[0]
        mean = producer_of(deviation.inputs[1], "ReduceMean")
        if squares and not multiplies and _reduced(mean) is deviation.inputs[0] is not None:
            return deviation
    return None


def _reduced(mean: ir.Node | None) -> ir.Value | None:
    """Return the input of a ReduceMean over the last axis that keeps it, or None."""
    if mean is None or mean.attributes.get_int("keepdims", 1) != 1:
        return None
    value, axes = mean.inputs[0], constant(input_at(mean, 1))
    places = list(mean.attributes.get_ints("axes", ())) if axes is None else axes.tolist()
    rank = len(value.shape) if value is not None and value.shape is not None else 0
    return value if places in ([-1], [rank - 1]) else None


def _epsilon(sqrt: ir.Node) -> float | None:
    """Return the constant summand of a Sqrt's argument."""
    shifted = producer_of(sqrt.inputs[0], "Add")
    numbers = [scalar(value) for value in shifted.inputs] if shifted is not None else []
    return next((number for number in numbers if number is not None), None)


def _quotient(sqrt: ir.Node, deviation: ir.Value) -> ir.Node:
    """Return the node that divides the deviation by a Sqrt."""
    root, kind = sqrt.outputs[0], "Div"
    user = sole_consumer(root)
    if user is not None and user.op_type == "Reciprocal":
        root, kind = user.outputs[0], "Mul"
        user = sole_consumer(root)
    operands = [] if user is None else list(user.inputs)
    orders = ([deviation, root],) if kind == "Div" else ([deviation, root], [root, deviation])
    if user is None or user.op_type != kind or operands not in orders:
        raise Declined("the standard deviation has another use than to divide the deviation")
    return user


def _applied(node: ir.Node, op_type: str, channels: Dim) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the node that multiplies or adds a constant vector to an output, and the vector."""
    value = node.outputs[0]
    user = sole_consumer(value)
    if user is None or user.op_type != op_type or user.domain or not isinstance(channels, int):
        return None, None
    vector = user.inputs[1] if user.inputs[0] is value else user.inputs[0]
    if len((vector.shape if vector is not None else None) or ()) != 1:
        return None, None
    return (user, vector) if is_channel_vector(vector, channels, 0) else (None, None)
