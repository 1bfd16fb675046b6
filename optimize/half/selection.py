"""Select the nodes of a graph that compute in half precision.

The rules go by operator, by what a node is computed from, and by its constants.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from latentforge.optimize.graph import constant, matches
from latentforge.optimize.half.float16 import fits

__all__ = [
    "AGNOSTIC",
    "CONTRIB",
    "FLOAT",
    "TIME_INPUTS",
    "half_inputs",
    "half_outputs",
    "select",
    "time_path",
]

TIME_INPUTS = ("timestep", "timestep_cond", "time_ids", "text_embeds", "noise_level")
"""Denoiser inputs of a few numbers per image. Nodes computed from them alone stay in float32: it
costs next to nothing, and sine and cosine of a timestep up to 1000, which half resolves to half a
unit, would be noise."""

FLOAT = {
    # Mean and variance of thousands of values: squares overflow from 256 on. LayerNormalization
    # requests float32 statistics itself (stash_type), but whether an engine obeys cannot be tested
    # without a GPU, so its inputs and outputs are in float32 too.
    "InstanceNormalization",
    "LayerNormalization",
    "GroupNormalization",
    "LpNormalization",
    "MeanVarianceNormalization",
    "BatchNormalization",
    "RMSNormalization",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL2",
    "ReduceProd",
    "Pow",
    "Sqrt",
    "Reciprocal",
    # Results beyond 65504 from small numbers, or arguments that need more than 11 bits.
    "Exp",
    "Log",
    "Sin",
    "Cos",
    "CumSum",
    "Range",
    "ConstantOfShape",
}
"""Operators that always stay in float32."""

CONTRIB: dict[str, frozenset[int]] = {
    "Attention": frozenset(),
    "BiasAdd": frozenset(),
    "BiasGelu": frozenset(),
    "BiasSplitGelu": frozenset(),
    "FastGelu": frozenset(),
    "FusedMatMul": frozenset(),
    "Gelu": frozenset(),
    "GroupNorm": frozenset({1, 2}),
    "MatMulNBits": frozenset(),
    "MultiHeadAttention": frozenset(),
    "NhwcConv": frozenset(),
    "QuickGelu": frozenset(),
    "SkipGroupNorm": frozenset({1, 2}),
    "SkipLayerNormalization": frozenset(),
}
"""Operators of com.microsoft with CUDA kernels for half, and their inputs that stay in float32.

The norms among them sum in float32 for any input, and TensorRT does not know them.
SkipLayerNormalization does so since May 2026 (onnxruntime pull request 28682); before, it sums
x ** 2 / n in half unless the CUDA provider has enable_skip_layer_norm_strict_mode.
"""

AGNOSTIC = {"Cast", "Shape", "Size"}
"""Operators that take any precision, and whose result has none or is set by an attribute."""

MOVES = {
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "QuantizeLinear",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
"""Operators that compute nothing: between two nodes in float32 they stay in float32.

QuantizeLinear is one because its result is integer: it takes either precision.
"""


def select(graph: ir.Graph, keep: Sequence[str]) -> set[ir.Node]:
    """Return the nodes that are to compute in half precision.

    Args:
        graph: with known types.
        keep: fnmatch patterns of the names of nodes that stay in float32.
    """
    opset = graph.opset_imports.get("", 1)
    time = time_path(graph)
    fixed = {
        node
        for node in graph
        if node in time or _stays(node, opset) or matches(str(node.name), keep)
    }
    movable = {node for node in graph if node not in fixed and _has_float(node, opset)}
    return movable - _moves_between_floats(graph, movable)


def _stays(node: ir.Node, opset: int) -> bool:
    """Return True if a node stays in float32 because of its operator or its constants."""
    if node.op_type in FLOAT or (node.domain and node.op_type not in CONTRIB):
        return True
    if node.op_type == "Cast" or _has_subgraph(node):
        return not _converts_integers(node)
    arrays = [constant(node.inputs[index]) for index in half_inputs(node, opset)]
    return not all(a is None or fits(np.asarray(a, np.float32), clamp=True) for a in arrays)


def _has_subgraph(node: ir.Node) -> bool:
    return any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())


def _converts_integers(node: ir.Node) -> bool:
    """Return True for a Cast of integers to float32, which may cast to half instead."""
    source = node.inputs[0] if node.op_type == "Cast" else None
    return source is not None and source.dtype is not None and not source.dtype.is_floating_point()


def time_path(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes computed from TIME_INPUTS and from nothing else but shapes."""
    values = {value for value in graph.inputs if value.name in TIME_INPUTS}
    nodes = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        others = [value for value in inputs if value not in values and constant(value) is None]
        if node.op_type in AGNOSTIC - {"Cast"} or values.isdisjoint(inputs):
            continue
        if all(value.dtype in (ir.DataType.INT64, ir.DataType.INT32) for value in others):
            nodes.add(node)
            values.update(node.outputs)
    return nodes


def _moves_between_floats(nodes: Iterable[ir.Node], movable: set[ir.Node]) -> set[ir.Node]:
    """Return the movable nodes that only move data from float32 nodes to float32 nodes.

    ::

        float32 ─ Reshape ─ Transpose ─ float32    returned: they stay in float32, without a Cast
        half ──── Reshape ─ Transpose ─ float32    not returned: one Cast, behind the Transpose
    """
    order = list(nodes)
    from_float: set[ir.Node] = set()
    for node in order:
        if node in movable and node.op_type in MOVES:
            values = [value for value in node.inputs if value is not None]
            sources = [value.producer() for value in values if constant(value) is None]
            if all(s is None or s in from_float or s not in movable for s in sources):
                from_float.add(node)
    to_float: set[ir.Node] = set()
    for node in reversed(order):
        users = [user for value in node.outputs for user in value.consumers()]
        if node in from_float and (
            node.op_type == "QuantizeLinear"
            or all(user in to_float or user not in movable for user in users)
        ):
            to_float.add(node)
    return to_float


def _has_float(node: ir.Node, opset: int) -> bool:
    """Return True if a node has a float32 input or output that may be in half."""
    if node.op_type in AGNOSTIC and not _converts_integers(node):
        return False
    return bool(half_inputs(node, opset) or half_outputs(node, opset))


def half_inputs(node: ir.Node, opset: int) -> list[int]:
    """Return the indices of a node's float32 inputs that may be in half."""
    float_only = _float_only(node.domain, node.op_type, opset)[0]
    return [
        index
        for index, value in enumerate(node.inputs)
        if value is not None and value.dtype == ir.DataType.FLOAT and not float_only(index)
    ]


def half_outputs(node: ir.Node, opset: int) -> list[ir.Value]:
    """Return a node's float32 outputs that may be in half."""
    float_only = _float_only(node.domain, node.op_type, opset)[1]
    return [
        value
        for index, value in enumerate(node.outputs)
        if value.dtype == ir.DataType.FLOAT and not float_only(index)
    ]


@cache
def _float_only(
    domain: str, op_type: str, opset: int
) -> tuple[Callable[[int], bool], Callable[[int], bool]]:
    """Return two predicates of an index: inputs and outputs that an operator lacks in half."""
    if domain:
        return CONTRIB.get(op_type, frozenset()).__contains__, frozenset[int]().__contains__
    schema = onnx.defs.get_schema(op_type, opset, domain)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def lacks_half(formals: Sequence[Any], index: int) -> bool:
        name = formals[min(index, len(formals) - 1)].type_str
        return "tensor(float16)" not in allowed.get(name, [name])

    return partial(lacks_half, schema.inputs), partial(lacks_half, schema.outputs)
