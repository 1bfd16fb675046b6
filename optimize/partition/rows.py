"""Row rules: operators that treat the rows of their inputs independently.

The part of the denoiser that depends on the timestep alone runs once for all steps of a schedule,
with the steps stacked along the first dimension. That is only correct for a node which computes
each row of its output from the same row of its inputs:

    3 runs of one row                      1 run of 3 rows
    (1, 320) ── MatMul ── (1, 1280)
    (1, 320) ── MatMul ── (1, 1280)        (3, 320) ── MatMul ── (3, 1280)        row-wise
    (1, 320) ── MatMul ── (1, 1280)

    (1, 320) ── Softmax(axis=0)            (3, 320) ── Softmax(axis=0): mixes the steps, refused

Each operator has a rule in a table; an operator without a rule is refused. A rule sees, for each
input, its shape in the original graph and the meaning of its rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.shape_inference import Shape

__all__ = ["BROADCASTING", "Operand", "Rows", "is_row_wise"]


class Rows(IntEnum):
    """Meaning that the first dimension of a stacked value had in the original graph."""

    SCALAR = 0  # the value had no dimensions
    ONE = 1  # a dimension of size 1
    REPEATED = 2  # the batch with equal rows; the stacked value has one row in their place
    DISTINCT = 3  # the batch with different rows


@dataclass(frozen=True)
class Operand:
    """Input of a node.

    Attributes:
        shape: its shape in the original graph.
        rows: meaning of its first dimension; None for a value that is the same in every step.
    """

    shape: Shape
    rows: Rows | None


_Operands = Sequence[Operand | None]
_Rule = Callable[[ir.Node, _Operands, Shape], bool]

BROADCASTING = ("Add", "Div", "Max", "Mean", "Min", "Mod", "Mul", "Pow", "Sub", "Sum")
"""Elementwise operators of several inputs, with multidirectional broadcasting."""

_UNARY = (
    *("Abs", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round"),
    *("Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"),
)


def is_row_wise(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    """Return True if each row of the output depends on the same row of the inputs alone.

    The rules cover the operators of which networks build embeddings; others count as mixing rows.

    Args:
        node: a node with at least one input that has rows.
        operands: its inputs.
        output: shape of its outputs in the original graph; the first dimension may differ.
    """
    rule = _RULES.get((node.domain, node.op_type))
    return rule is not None and rule(node, operands, output)


def _elementwise(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    present = [operand for operand in operands if operand is not None]
    rank = max(len(operand.shape) for operand in present if operand.rows is not None)
    return all(_broadcasts_by_row(operand, rank) for operand in present)


def _broadcasts_by_row(operand: Operand, rank: int) -> bool:
    """Return True if broadcasting to a rank aligns an operand's rows, or all rows share it."""
    if operand.rows is not None:
        return len(operand.shape) == rank
    return len(operand.shape) < max(rank, 1) or operand.shape[0] == 1 and len(operand.shape) == rank


def _only_first_has_rows(operands: _Operands) -> bool:
    first, *rest = operands
    rows = first is not None and first.rows is not None
    return rows and all(operand is None or operand.rows is None for operand in rest)


def _matmul(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    ranks = [len(operand.shape) for operand in operands if operand is not None]
    return _only_first_has_rows(operands) and ranks[0] >= 2 and (node.domain != "" or ranks[1] == 2)


def _gemm(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    bias = operands[2] if len(operands) > 2 else None
    shared = bias is None or len(bias.shape) < 2 or bias.shape[0] == 1
    return _only_first_has_rows(operands) and not node.attributes.get_int("transA", 0) and shared


def _quantize(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    scale = operands[1]
    per_tensor = scale is not None and scale.shape in ((), (1,))
    return _only_first_has_rows(operands) and (per_tensor or _is_inner_axis(_axis(node, 1), output))


def _inner_axis(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    return _only_first_has_rows(operands) and _is_inner_axis(_axis(node, 0), output)


def _concat(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    all_have_rows = all(operand is not None and operand.rows is not None for operand in operands)
    return all_have_rows and _is_inner_axis(_axis(node, 0), output)


def _inner_axes_input(index: int) -> _Rule:
    """Return the rule of operators whose axes are the input at an index."""

    def rule(node: ir.Node, operands: _Operands, output: Shape) -> bool:
        axes = constant(node.inputs[index]) if len(node.inputs) > index else None
        if axes is None or not _only_first_has_rows(operands):
            return False
        rank = max(len(operands[0].shape) if operands[0] else 0, len(output))
        return all(int(axis) % rank != 0 for axis in np.ravel(axes))

    return rule


def _unsqueeze(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    first = operands[0]
    scalar = first is not None and first.rows is Rows.SCALAR
    return len(output) == 1 if scalar else _inner_axes_input(1)(node, operands, output)


def _transpose(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    perm = node.attributes.get_ints("perm", None)
    return perm is not None and list(perm[:1]) == [0]


def _flatten(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    return node.attributes.get_int("axis", 1) == 1


def _reshape(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    """Check that each row keeps its elements; the target shape itself is replaced later."""
    first = operands[0]
    if first is None or not output:
        return False
    if first.rows is Rows.SCALAR:
        return len(output) == 1
    return first.shape[0] == output[0] and _size(first.shape[1:]) == _size(output[1:])


def _size(shape: Shape) -> float:
    """Return the product of fixed sizes, or NaN, which equals nothing, if one is free."""
    return math.prod(size if isinstance(size, int) else math.nan for size in shape)


def _expand(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    """Check that only the number of rows changes."""
    first = operands[0]
    return first is not None and len(output) > 0 and output[1:] == first.shape[1:]


def _axis(node: ir.Node, default: int) -> int:
    return node.attributes.get_int("axis", default)


def _is_inner_axis(axis: int, shape: Shape) -> bool:
    """Return True for an axis other than the first, which holds the rows."""
    return len(shape) > 1 and axis % len(shape) != 0


_RULES: Mapping[tuple[str, str], _Rule] = {
    **{("", name): _elementwise for name in (*BROADCASTING, *_UNARY)},
    **{("com.microsoft", name): _elementwise for name in ("FastGelu", "Gelu", "QuickGelu")},
    ("", "MatMul"): _matmul,
    ("com.microsoft", "MatMulNBits"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "QuantizeLinear"): _quantize,
    ("", "DequantizeLinear"): _quantize,
    ("", "Concat"): _concat,
    ("", "Split"): _inner_axis,
    ("", "Gather"): _inner_axis,
    ("", "Slice"): _inner_axes_input(3),
    ("", "Squeeze"): _inner_axes_input(1),
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Transpose"): _transpose,
    ("", "Flatten"): _flatten,
    ("", "Reshape"): _reshape,
    ("", "Expand"): _expand,
}
