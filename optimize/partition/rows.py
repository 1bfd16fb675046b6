"""Which operators work on each row by itself, so that rows of many runs can be stacked into one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.shape_inference import Shape

__all__ = ["BROADCASTING", "Operand", "Rows", "row_wise"]


class Rows(IntEnum):
    """What the first dimension of a stacked value was in the graph as it came."""

    SCALAR = 0  # there was no dimension
    ONE = 1
    ALIKE = 2  # the batch, all its rows equal; now there is one
    OWN = 3  # the batch, each row with numbers of its own


@dataclass(frozen=True)
class Operand:
    """An input of a node: its shape as the graph came, and its rows; None where it has none.

    What has no rows is the same in every run.
    """

    shape: Shape
    rows: Rows | None


_Operands = Sequence[Operand | None]
_Rule = Callable[[ir.Node, _Operands, Shape], bool]

BROADCASTING = ("Add", "Div", "Max", "Mean", "Min", "Mod", "Mul", "Pow", "Sub", "Sum")
"""Operators of as many inputs as they like, all broadcast to one shape."""

_UNARY = (
    *("Abs", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round"),
    *("Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"),
)


def row_wise(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    """Whether rows of its first operand, and of what else has rows, go through it one by one.

    That is known of the operators that networks make embeddings of; of all others it is denied.

    Args:
        node: whose first input has rows, or another.
        operands: its inputs.
        output: the shape of its outputs as the graph came, the first dimension apart.
    """
    rule = _RULES.get((node.domain, node.op_type))
    return rule is not None and rule(node, operands, output)


def _elementwise(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    given = [operand for operand in operands if operand is not None]
    rank = max(len(operand.shape) for operand in given if operand.rows is not None)
    return all(_aligned(operand, rank) for operand in given)


def _aligned(operand: Operand, rank: int) -> bool:
    """Whether an operand has its rows where one of that rank has them, or is the same for all."""
    if operand.rows is not None:
        return len(operand.shape) == rank
    return len(operand.shape) < max(rank, 1) or operand.shape[0] == 1 and len(operand.shape) == rank


def _first_alone(operands: _Operands) -> bool:
    """Whether the first operand has rows, and no other."""
    first, *others = operands
    rows = first is not None and first.rows is not None
    return rows and all(operand is None or operand.rows is None for operand in others)


def _matmul(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    ranks = [len(operand.shape) for operand in operands if operand is not None]
    return _first_alone(operands) and ranks[0] >= 2 and (node.domain != "" or ranks[1] == 2)


def _gemm(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    bias = operands[2] if len(operands) > 2 else None
    shared = bias is None or len(bias.shape) < 2 or bias.shape[0] == 1
    return _first_alone(operands) and not node.attributes.get_int("transA", 0) and shared


def _quantize(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    scale = operands[1]
    whole = scale is not None and scale.shape in ((), (1,))
    return _first_alone(operands) and (whole or _beside(_axis(node, 1), output))


def _along_axis(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    return _first_alone(operands) and _beside(_axis(node, 0), output)


def _concat(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    stacked = all(operand is not None and operand.rows is not None for operand in operands)
    return stacked and _beside(_axis(node, 0), output)


def _by_axes(index: int) -> _Rule:
    """The rule of operators that are given axes as an input."""

    def rule(node: ir.Node, operands: _Operands, output: Shape) -> bool:
        axes = constant(node.inputs[index]) if len(node.inputs) > index else None
        if axes is None or not _first_alone(operands):
            return False
        rank = max(len(operands[0].shape) if operands[0] else 0, len(output))
        return all(int(axis) % rank != 0 for axis in np.ravel(axes))

    return rule


def _unsqueeze(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    first = operands[0]
    number = first is not None and first.rows is Rows.SCALAR
    return len(output) == 1 if number else _by_axes(1)(node, operands, output)


def _transpose(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    perm = node.attributes.get_ints("perm", None)
    return perm is not None and list(perm[:1]) == [0]


def _flatten(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    return node.attributes.get_int("axis", 1) == 1


def _reshape(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    """Every row keeps its numbers; which shape was asked for does not matter."""
    first = operands[0]
    if first is None or not output:
        return False
    if first.rows is Rows.SCALAR:
        return len(output) == 1
    return first.shape[0] == output[0] and _size(first.shape[1:]) == _size(output[1:])


def _size(shape: Shape) -> float:
    """The product of known sizes; of others one that equals nothing."""
    return math.prod(size if isinstance(size, int) else math.nan for size in shape)


def _expand(node: ir.Node, operands: _Operands, output: Shape) -> bool:
    """More rows, and nothing else."""
    first = operands[0]
    return first is not None and len(output) > 0 and output[1:] == first.shape[1:]


def _axis(node: ir.Node, default: int) -> int:
    return node.attributes.get_int("axis", default)


def _beside(axis: int, shape: Shape) -> bool:
    """Whether an axis is another than that of the rows."""
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
    ("", "Split"): _along_axis,
    ("", "Gather"): _along_axis,
    ("", "Slice"): _by_axes(3),
    ("", "Squeeze"): _by_axes(1),
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Transpose"): _transpose,
    ("", "Flatten"): _flatten,
    ("", "Reshape"): _reshape,
    ("", "Expand"): _expand,
}
