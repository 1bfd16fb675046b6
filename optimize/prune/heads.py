"""Remove heads of attention, fused into MultiHeadAttention or not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import GraphLayer, constant, layers, matches, set_weight
from latentforge.optimize.prune.averages import grams, need_feeds
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

__all__ = ["Attention", "attentions", "prune_heads"]

_HEADS_FIRST = (0, 2, 1, 3)  # and back: it is its own inverse


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Projections of queries, keys and values, and that of what attention makes of them.

    Attributes:
        inputs: the three projections, each with the Add of its bias, if it has one.
        output: the projection back; its input is (batch, tokens, heads * size).
        heads: their number.
        node: the MultiHeadAttention, or None if attention is in parts.
        splits: of attention in parts, the three Reshapes to (batch, tokens, heads, size).
    """

    inputs: tuple[tuple[GraphLayer, ir.Node | None], ...]
    output: GraphLayer
    heads: int
    node: ir.Node | None = None
    splits: tuple[ir.Node, ...] = ()

    @property
    def name(self) -> str:
        return self.inputs[0][0].name.rpartition("/")[0].rpartition(".")[0]


def attentions(graph: ir.Graph, keep: Sequence[str] = ()) -> list[Attention]:
    """Every attention whose heads can be told apart, in the order of the graph.

    Left out are those with a bias or a past inside a fused node, with a mask for each head, and
    with sizes written into Reshapes between the split and the join of heads.
    """
    linear = {layer.node: layer for layer in layers(graph) if layer.linear}
    found = [_attention(layer, linear) for layer in linear.values()]
    return [
        attention
        for attention in found
        if attention is not None
        and not any(
            matches(layer.name, keep)
            for layer in (attention.output, *(layer for layer, _ in attention.inputs))
        )
    ]


def _attention(output: GraphLayer, linear: dict[ir.Node, GraphLayer]) -> Attention | None:
    node = output.input.producer()
    if node is None or single_user(output.input) is None:
        return None
    if node.op_type == "MultiHeadAttention":
        return _fused(node, output, linear)
    return _in_parts(node, output, linear) if node.op_type == "Reshape" else None


def _fused(
    node: ir.Node, output: GraphLayer, linear: dict[ir.Node, GraphLayer]
) -> Attention | None:
    inputs = [*node.inputs, *[None] * 8]
    mask = inputs[5]
    if any(value is not None for value in (inputs[3], *inputs[6:])) or len(node.outputs) > 1:
        return None
    if mask is not None and (mask.shape is None or len(mask.shape) != 4 or mask.shape[1] != 1):
        return None
    projections = [_projection(value, linear) for value in inputs[:3]]
    heads = node.attributes.get_int("num_heads", 1)
    return _made(projections, output, heads, node=node)


def _made(
    projections: Sequence[tuple[GraphLayer, ir.Node | None] | None],
    output: GraphLayer,
    heads: int,
    *,
    node: ir.Node | None = None,
    splits: tuple[ir.Node, ...] = (),
) -> Attention | None:
    inputs = tuple(projection for projection in projections if projection is not None)
    widths = [layer.array.shape[layer.out_axis] for layer, _ in inputs]
    widths.append(output.array.shape[output.in_axis])
    if len(inputs) != 3 or widths[2] != widths[3] or any(width % heads for width in widths):
        return None
    return Attention(inputs=inputs, output=output, heads=heads, node=node, splits=splits)


def _projection(
    value: ir.Value | None, linear: dict[ir.Node, GraphLayer]
) -> tuple[GraphLayer, ir.Node | None] | None:
    """The layer that a value comes from and the Add of its bias, if nothing else uses them."""
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


def _in_parts(
    join: ir.Node, output: GraphLayer, linear: dict[ir.Node, GraphLayer]
) -> Attention | None:
    """Attention from the Reshape that joins heads back to the three that split them."""
    product = _transposed(join.inputs[0])
    if product is None or product.op_type != "MatMul":
        return None
    value = _transposed(product.inputs[1])
    scores = _scores(product.inputs[0])
    if value is None or scores is None:
        return None
    splits = (*_splits(scores.inputs[0]), *_splits(scores.inputs[1]), value)
    if len(splits) != 3 or any(node.op_type != "Reshape" for node in splits):
        return None
    if any(len(node.outputs[0].shape or ()) != 4 for node in splits):
        return None
    heads, *others = {size(node.outputs[0], 2) for node in splits}
    if others or not heads or not all(size(node.outputs[0], 3) for node in splits):
        return None
    projections = [_projection(node.inputs[0], linear) for node in splits]
    return _made(projections, output, heads, splits=splits)


def _transposed(value: ir.Value | None) -> ir.Node | None:
    """The node behind a Transpose of tokens and heads."""
    node = None if value is None or single_user(value) is None else value.producer()
    if node is None or node.op_type != "Transpose":
        return None
    source = node.inputs[0]
    perm = tuple(node.attributes.get_ints("perm", ()))
    return source.producer() if source is not None and perm == _HEADS_FIRST else None


def _scores(value: ir.Value | None) -> ir.Node | None:
    """The product of queries and keys behind a Softmax, its mask and what guards it from NaN."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Where", "Softmax", "Add", "Mul", "Div"):
        following = [v for v in node.inputs if v is not None and _per_head(v)]
        node = following[0].producer() if len(following) == 1 else None
    return node if node is not None and node.op_type == "MatMul" else None


def _per_head(value: ir.Value) -> bool:
    """Whether a value is of four dimensions, numbers, and not the same for every head."""
    shape = value.shape
    number = value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return number and shape is not None and len(shape) == 4 and shape[1] != 1


def _splits(value: ir.Value | None) -> tuple[ir.Node, ...]:
    """The Reshape that split heads, behind scaling, transposing and reshaping by computed sizes."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Mul", "Div", "Transpose", "Reshape"):
        source = node.inputs[0]
        if source is None or any(constant(v) is None for v in _operands(node)):
            return ()
        if node.op_type == "Reshape":
            if source.shape is not None and len(source.shape) == 3 and _is_layer(source):
                return (node,)
            if constant(node.inputs[1]) is not None:
                return ()
        node = source.producer()
    return ()


def _operands(node: ir.Node) -> Sequence[ir.Value | None]:
    return node.inputs[1:] if node.op_type in ("Mul", "Div") else ()


def _is_layer(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type in ("MatMul", "Gemm", "Add")


def prune_heads(
    model: ir.Model, share: float, keep: Sequence[str], feeds: Sequence[Feeds]
) -> list[Removed]:
    """Remove the share of each attention's heads that adds least to its output; one stays.

    The score of head h is E||o_h W_h||**2, with o_h what it gives for a token and W_h its rows of
    the output projection.

    Args:
        model: edited in place.
        share: of heads, from 0 to 1, rounded down to whole heads.
        keep: patterns, as of fnmatch, of names of layers that stay.
        feeds: recorded inputs of the graph.
    """
    found = [a for a in attentions(model.graph, keep) if _staying(a.heads, share) < a.heads]
    if not found:
        return []
    need_feeds(feeds, "pruning of heads")
    measured = grams(model, {str(a.output.input.name): a.heads for a in found}, feeds)
    removed = []
    for attention in found:
        scores = _costs(attention, measured[str(attention.output.input.name)])
        staying = _staying(attention.heads, share)
        order = np.argsort(-scores, kind="stable")
        before = parameters(model.graph)
        _narrow(model.graph, attention, np.sort(order[:staying]))
        common.RemoveUnusedNodesPass()(model)
        gone, cost = before - parameters(model.graph), float(scores[order[staying:]].sum())
        removed.append(Removed(kind="heads", name=attention.name, score=cost, parameters=gone))
    if any(attention.splits for attention in found):
        common.ShapeInferencePass()(model)
    return removed


def _staying(heads: int, share: float) -> int:
    return max(1, heads - int(share * heads + 1e-9))


def _costs(attention: Attention, gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """By head, trace(W_h' G_h W_h), where G_h is the mean outer product of what the head gives."""
    layer = attention.output
    rows = layer.array if layer.in_axis == 0 else layer.array.T
    weight = rows.astype(np.float64).reshape(attention.heads, -1, rows.shape[1])
    return np.asarray(((gram @ weight) * weight).sum(axis=(1, 2)))


def _narrow(graph: ir.Graph, attention: Attention, heads: Indices) -> None:
    """Keep only some heads."""
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
    """The channels of some heads, of width channels in all."""
    each = width // count
    return (heads[:, None] * each + np.arange(each)).reshape(-1)


def _reshape(graph: ir.Graph, attention: Attention, heads: int) -> None:
    """Let the Reshapes around attention in parts split and join fewer heads.

    Shapes of values between them are forgotten, for shape inference to find anew.
    """
    for split in attention.splits:
        _set_shape(graph, split, [0, 0, heads, size(split.outputs[0], 3)])
    join = attention.output.input.producer()
    assert join is not None
    _set_shape(graph, join, [0, 0, -1])
    for node in _after(attention.splits, join):
        for value in node.outputs:
            value.shape = None


def _after(splits: Sequence[ir.Node], join: ir.Node) -> set[ir.Node]:
    """The nodes from those that split heads up to the one that joins them, without it."""
    found = set(splits)
    open_ = list(splits)
    while open_:
        users = {user for value in open_.pop().outputs for user in value.consumers()}
        open_ += users - found - {join}
        found |= users - {join}
    return found


def _set_shape(graph: ir.Graph, node: ir.Node, sizes: list[int]) -> None:
    """Make a Reshape keep batch and tokens, and set what follows."""
    set_weight(graph, node, 1, np.array(sizes, np.int64), f"{node.name}_heads")
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
