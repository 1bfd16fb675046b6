"""Prune attention heads, fused into MultiHeadAttention or written as separate operators.

The matchers start from the output projection. Fused:

    x ─► q ─► Add(bias) ─┐
    c ─► k ─► Add(bias) ─┼─► MultiHeadAttention(num_heads) ─► output ─► y
    c ─► v ─► Add(bias) ─┘

Separate operators, where b, t, h, d are batch, tokens, heads and size of a head:

    x ─► q ─► Reshape ─► Transpose ─► Mul(scale) ─┬─► MatMul ─► Add(mask) ─► Softmax ─┐
              (b,t,h,d)  (b,h,t,d)                │             (optional)            │
    c ─► k ─► Reshape ─► Transpose ───────────────┘                                   │
              (b,t,h,d)  (b,h,d,t)                                                    │
    c ─► v ─► Reshape ─► Transpose ─┬─────────────────────────────────────────────────┘
              (b,t,h,d)  (b,h,t,d)  │
                                    └─► MatMul ─► Transpose ─► Reshape ─► output ─► y
                                                  (b,t,h,d)    (b,t,h*d)

Removing a head removes its d columns of each projection and its d rows of the output projection.
The number of heads is an attribute of the fused node, and a size in the Reshapes otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import GraphLayer, constant, layers, matches, set_weight
from latentforge.optimize.prune.averages import check_feeds, head_gram_matrices
from latentforge.optimize.prune.blocks import parameters
from latentforge.optimize.prune.records import Removed
from latentforge.optimize.prune.slicing import (
    Indices,
    resize,
    single_user,
    size,
    take,
    take_outputs,
)
from latentforge.runtime.tensor import Feeds

__all__ = ["Attention", "attentions", "narrow_heads", "prune_heads"]

_SWAP_TOKENS_AND_HEADS = (0, 2, 1, 3)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention with its projections.

    Attributes:
        inputs: projections of queries, keys and values, each with the Add of its bias, if any.
        output: output projection; its input is (batch, tokens, heads * size).
        heads: number of heads.
        node: the MultiHeadAttention, None for attention in separate operators.
        splits: for separate operators, the three Reshapes to (batch, tokens, heads, size).
    """

    inputs: tuple[tuple[GraphLayer, ir.Node | None], ...]
    output: GraphLayer
    heads: int
    node: ir.Node | None = None
    splits: tuple[ir.Node, ...] = ()

    @property
    def name(self) -> str:
        """Name of the attention's module."""
        return self.inputs[0][0].name.rpartition("/")[0].rpartition(".")[0]


def attentions(graph: ir.Graph, exclude: Sequence[str] = ()) -> list[Attention]:
    """Find all attentions whose heads can be separated, in the order of the graph.

    Attention is left out if a fused node has a bias or past keys, if the mask differs by head, or
    if Reshapes between split and join of the heads have constant sizes.

    Args:
        graph: the graph.
        exclude: fnmatch patterns of the names of layers to leave out.
    """
    linear = {layer.node: layer for layer in layers(graph) if layer.linear}
    candidates = [_attention(layer, linear) for layer in linear.values()]
    return [
        attention
        for attention in candidates
        if attention is not None
        and not any(
            matches(layer.name, exclude)
            for layer in (attention.output, *(layer for layer, _ in attention.inputs))
        )
    ]


def _attention(output: GraphLayer, linear: dict[ir.Node, GraphLayer]) -> Attention | None:
    """Match attention whose output projection is a layer."""
    node = output.input.producer()
    if node is None or single_user(output.input) is None:
        return None
    if node.op_type == "MultiHeadAttention":
        return _fused(node, output, linear)
    return _unfused(node, output, linear) if node.op_type == "Reshape" else None


def _fused(
    node: ir.Node, output: GraphLayer, linear: dict[ir.Node, GraphLayer]
) -> Attention | None:
    """Match a MultiHeadAttention with three projections, with no mask or one for all heads."""
    inputs = [*node.inputs, *[None] * 8]
    mask = inputs[5]
    if any(value is not None for value in (inputs[3], *inputs[6:])) or len(node.outputs) > 1:
        return None
    if mask is not None and (mask.shape is None or len(mask.shape) != 4 or mask.shape[1] != 1):
        return None
    projections = [_projection(value, linear) for value in inputs[:3]]
    heads = node.attributes.get_int("num_heads", 1)
    return _checked(projections, output, heads, node=node)


def _checked(
    projections: Sequence[tuple[GraphLayer, ir.Node | None] | None],
    output: GraphLayer,
    heads: int,
    *,
    node: ir.Node | None = None,
    splits: tuple[ir.Node, ...] = (),
) -> Attention | None:
    """Return the attention if it has three projections whose widths fit the number of heads."""
    inputs = tuple(projection for projection in projections if projection is not None)
    widths = [layer.array.shape[layer.out_axis] for layer, _ in inputs]
    widths.append(output.array.shape[output.in_axis])
    if len(inputs) != 3 or widths[2] != widths[3] or any(width % heads for width in widths):
        return None
    return Attention(inputs=inputs, output=output, heads=heads, node=node, splits=splits)


def _projection(
    value: ir.Value | None, linear: dict[ir.Node, GraphLayer]
) -> tuple[GraphLayer, ir.Node | None] | None:
    """Return the layer that computes a value and the Add of its bias, if nothing else uses them.

    The value is that of ``MatMul`` or of ``MatMul ─► Add(bias)``; the second entry is None if
    there is no Add.
    """
    node = value.producer() if value is not None and single_user(value) else None
    if node is None or node in linear:
        return None if node is None else (linear[node], None)
    if node.op_type != "Add":
        return None
    left, right = node.inputs
    bias, source = (left, right) if constant(left) is not None else (right, left)
    layer = linear.get(source.producer()) if source is not None else None  # type: ignore[arg-type]
    array = constant(bias)
    if layer is None or array is None or single_user(layer.output) is None:
        return None
    return (layer, node) if array.shape[-1:] == (layer.array.shape[layer.out_axis],) else None


def _unfused(
    join: ir.Node, output: GraphLayer, linear: dict[ir.Node, GraphLayer]
) -> Attention | None:
    """Match attention from the Reshape that joins the heads back to those that split them."""
    product = _before_transpose(join.inputs[0])
    if product is None or product.op_type != "MatMul":
        return None
    value = _before_transpose(product.inputs[1])
    scores = _score_product(product.inputs[0])
    if value is None or scores is None:
        return None
    splits = (*_split(scores.inputs[0]), *_split(scores.inputs[1]), value)
    if len(splits) != 3 or any(node.op_type != "Reshape" for node in splits):
        return None
    if any(len(node.outputs[0].shape or ()) != 4 for node in splits):
        return None
    heads, *different = {size(node.outputs[0], 2) for node in splits}
    if different or not heads or not all(size(node.outputs[0], 3) for node in splits):
        return None
    projections = [_projection(node.inputs[0], linear) for node in splits]
    return _checked(projections, output, heads, splits=splits)


def _before_transpose(value: ir.Value | None) -> ir.Node | None:
    """Return the node in front of a Transpose that swaps tokens and heads."""
    node = None if value is None or single_user(value) is None else value.producer()
    if node is None or node.op_type != "Transpose":
        return None
    source = node.inputs[0]
    perm = tuple(node.attributes.get_ints("perm", ()))
    return source.producer() if source is not None and perm == _SWAP_TOKENS_AND_HEADS else None


def _score_product(value: ir.Value | None) -> ir.Node | None:
    """Return the product of queries and keys in front of scaling, mask, Softmax and NaN guard.

    MatMul ─► Mul(scale) ─► Add(mask) ─► Softmax ─► Where(isnan, 0, ...) ─► value
    """
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Where", "Softmax", "Add", "Mul", "Div"):
        scores = [v for v in node.inputs if v is not None and _differs_by_head(v)]
        node = scores[0].producer() if len(scores) == 1 else None
    return node if node is not None and node.op_type == "MatMul" else None


def _differs_by_head(value: ir.Value) -> bool:
    """Return True for float values of four dimensions, of which the second is not 1."""
    shape = value.shape
    is_float = value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return is_float and shape is not None and len(shape) == 4 and shape[1] != 1


def _split(value: ir.Value | None) -> tuple[ir.Node, ...]:
    """Return the Reshape that splits the heads of queries or keys, as a tuple of one node.

    Scaling by constants, Transpose and Reshape by computed sizes may follow it:

        layer ─► Reshape (b, t, h, d) ─► Transpose ─► Reshape ─► Transpose ─► Mul ─► value

    Returns:
        An empty tuple if another operator or a Reshape by constant sizes is in between.
    """
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Mul", "Div", "Transpose", "Reshape"):
        source = node.inputs[0]
        if source is None or any(constant(v) is None for v in _factors(node)):
            return ()
        if node.op_type == "Reshape":
            if source.shape is not None and len(source.shape) == 3 and _is_projection(source):
                return (node,)
            if constant(node.inputs[1]) is not None:
                return ()
        node = source.producer()
    return ()


def _factors(node: ir.Node) -> Sequence[ir.Value | None]:
    return node.inputs[1:] if node.op_type in ("Mul", "Div") else ()


def _is_projection(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type in ("MatMul", "Gemm", "Add")


def prune_heads(
    model: ir.Model, fraction: float, exclude: Sequence[str], feeds: Sequence[Feeds]
) -> list[Removed]:
    """Remove a fraction of each attention's heads, those that contribute least to its output.

    The score of head h is E||o_h W_h||**2, where o_h is its output for a token and W_h its rows of
    the output projection. At least one head remains.

    Args:
        model: edited in place.
        fraction: fraction of heads to remove, 0 to 1, rounded down to whole heads.
        exclude: fnmatch patterns of the names of layers that are not pruned.
        feeds: recorded inputs of the graph.
    """
    candidates = [
        a for a in attentions(model.graph, exclude) if _remaining(a.heads, fraction) < a.heads
    ]
    if not candidates:
        return []
    check_feeds(feeds, "pruning of heads")
    heads = {str(a.output.input.name): a.heads for a in candidates}
    measured = head_gram_matrices(model, heads, feeds)
    removed = []
    for attention in candidates:
        scores = _scores(attention, measured[str(attention.output.input.name)])
        remaining = _remaining(attention.heads, fraction)
        order = np.argsort(-scores, kind="stable")
        before = parameters(model.graph)
        narrow_heads(model.graph, attention, np.sort(order[:remaining]))
        common.RemoveUnusedNodesPass()(model)
        count, cost = before - parameters(model.graph), float(scores[order[remaining:]].sum())
        removed.append(Removed(kind="heads", name=attention.name, score=cost, parameters=count))
    if any(attention.splits for attention in candidates):
        common.ShapeInferencePass()(model)
    return removed


def _remaining(heads: int, fraction: float) -> int:
    return max(1, heads - int(fraction * heads + 1e-9))


def _scores(attention: Attention, gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return trace(W_h' G_h W_h) for each head.

    Args:
        attention: the attention, of whose output projection W_h are the rows of head h.
        gram: (heads, size, size) mean outer products G_h of the heads' outputs.
    """
    layer = attention.output
    rows = layer.array if layer.in_axis == 0 else layer.array.T
    weight = rows.astype(np.float64).reshape(attention.heads, -1, rows.shape[1])
    return np.asarray(((gram @ weight) * weight).sum(axis=(1, 2)))


def narrow_heads(graph: ir.Graph, attention: Attention, heads: Indices) -> None:
    """Keep a subset of an attention's heads, in place.

    Shapes of values between separate operators are cleared, for shape inference to set them again.
    """
    for layer, bias in attention.inputs:
        indices = _channels(layer.array.shape[layer.out_axis], attention.heads, heads)
        take_outputs(graph, layer, indices)
        if bias is not None:
            take(graph, bias, int(constant(bias.inputs[1]) is not None), indices, -1)
            resize(bias.outputs[0], len(indices))
    width = attention.output.array.shape[attention.output.in_axis]
    indices = _channels(width, attention.heads, heads)
    resize(attention.output.input, len(indices))
    take(graph, attention.output.node, 1, indices, attention.output.in_axis)
    if attention.node is not None:
        attention.node.attributes["num_heads"] = ir.AttrInt64("num_heads", len(heads))
    else:
        _reshape(graph, attention, len(heads))


def _channels(width: int, count: int, heads: Indices) -> Indices:
    """Return the channels of a subset of the heads.

    Args:
        width: number of channels of all heads.
        count: number of heads.
        heads: indices of the heads to keep.
    """
    size_of_head = width // count
    return (heads[:, None] * size_of_head + np.arange(size_of_head)).reshape(-1)


def _reshape(graph: ir.Graph, attention: Attention, heads: int) -> None:
    """Set the number of heads in the Reshapes that split and join them.

    Shapes of values in between are cleared, for shape inference to set them again.
    """
    for split in attention.splits:
        _set_shape(graph, split, [0, 0, heads, size(split.outputs[0], 3)])
    join = attention.output.input.producer()
    assert join is not None
    _set_shape(graph, join, [0, 0, -1])
    for node in _nodes_between(attention.splits, join):
        for value in node.outputs:
            value.shape = None


def _nodes_between(splits: Sequence[ir.Node], join: ir.Node) -> set[ir.Node]:
    """Return the nodes from the Reshapes that split heads up to the one that joins them."""
    visited = set(splits)
    pending = list(splits)
    while pending:
        users = {user for value in pending.pop().outputs for user in value.consumers()}
        pending += users - visited - {join}
        visited |= users - {join}
    return visited


def _set_shape(graph: ir.Graph, node: ir.Node, sizes: list[int]) -> None:
    """Set the sizes of a Reshape, in which 0 copies a size of its input."""
    set_weight(graph, node, 1, np.array(sizes, np.int64), f"{node.name}_heads")
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
