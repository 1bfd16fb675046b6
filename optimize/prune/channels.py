"""Prune hidden channels of MLPs: GEGLU of UNets, GELU and QuickGELU of text encoders.

The matcher finds two linear layers with channelwise operators between them. A gated MLP computes
values and gates with one layer of twice the width:

    without a gate     x ─► first ─► Add(bias) ─► GELU ─► second ─► y
                            (n, h)                        (h, m)

    gated (GEGLU)      x ─► first ─► Add(bias) ─► Split ─┬─ values ─────► Mul ─► second ─► y
                           (n, 2 h)                      └─ gates ─► GELU ─┘     (h, m)

With fewer hidden channels k < h, the columns of the first layer (k values and their k gates), the
bias, other constants and the rows of the second layer are sliced, and Split gets sizes (k, k).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import GraphLayer, constant, layers, matches, module
from latentforge.optimize.prune.averages import check_feeds, mean_squares
from latentforge.optimize.prune.blocks import parameters
from latentforge.optimize.prune.records import Removed
from latentforge.optimize.prune.slicing import Indices, replace, resize, size, take, take_outputs
from latentforge.runtime.tensor import Feeds

__all__ = ["Mlp", "mlps", "narrow_channels", "prune_channels"]

_CHANNELWISE = {
    "Add",
    "BiasGelu",
    "BiasSplitGelu",
    "Div",
    "Erf",
    "FastGelu",
    "Gelu",
    "Mul",
    "QuickGelu",
    "Relu",
    "Sigmoid",
    "Split",
    "Tanh",
}
"""Operators between the two layers of an MLP, which do not mix channels."""


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Two linear layers over tokens, with an activation between them.

    Attributes:
        first: layer with ``hidden`` output channels, or twice as many: values, then their gates.
        second: layer with ``hidden`` input channels.
        between: nodes between the layers.
        hidden: number of hidden channels.
    """

    first: GraphLayer
    second: GraphLayer
    between: tuple[ir.Node, ...]
    hidden: int

    @property
    def name(self) -> str:
        """Name of the first layer's module."""
        return module(self.first.name)


def mlps(graph: ir.Graph, exclude: Sequence[str] = ()) -> list[Mlp]:
    """Find all MLPs whose hidden channels nothing else uses, in the order of the graph.

    Args:
        graph: the graph.
        exclude: fnmatch patterns of the names of layers to leave out.
    """
    linear = {layer.node: layer for layer in layers(graph) if layer.linear}
    matched = (_mlp(layer, linear) for layer in linear.values() if len(layer.input.shape or ()) > 2)
    return [
        mlp
        for mlp in matched
        if mlp is not None
        and not any(matches(layer.name, exclude) for layer in (mlp.first, mlp.second))
    ]


def _mlp(second: GraphLayer, linear: dict[ir.Node, GraphLayer]) -> Mlp | None:
    """Match an MLP from its second layer back to its first.

    Returns:
        None if the input comes from several layers, through an operator that may mix channels, or
        if the channels are used elsewhere.
    """
    between: list[ir.Node] = []
    sources: set[ir.Node] = set()
    pending = [second.input]
    while pending:
        node = pending.pop().producer()
        if node in linear:
            sources.add(node)
        elif node is None or node.op_type not in _CHANNELWISE:
            return None
        elif node not in between:
            between.append(node)
            pending += [v for v in node.inputs if v is not None and constant(v) is None]
    hidden = second.array.shape[second.in_axis]
    if len(sources) != 1:
        return None
    mlp = Mlp(first=linear[sources.pop()], second=second, between=tuple(between), hidden=hidden)
    return mlp if _is_isolated(mlp) and _has_consistent_widths(mlp) else None


def _is_isolated(mlp: Mlp) -> bool:
    """Return True if nothing outside the MLP uses the values between its layers."""
    inside = {*mlp.between, mlp.second.node}
    values = [mlp.first.output, *(value for node in mlp.between for value in node.outputs)]
    return all(inside.issuperset(v.consumers()) and not v.is_graph_output() for v in values)


def _has_consistent_widths(mlp: Mlp) -> bool:
    """Return True if every value between has the hidden width, or twice that in front of a gate."""
    gates = [node for node in mlp.between if node.op_type in ("Split", "BiasSplitGelu")]
    wide = mlp.first.array.shape[mlp.first.out_axis]
    if len(gates) > 1 or wide != mlp.hidden * (1 + len(gates)):
        return False
    if any(node.attributes.get_int("axis", -1) not in (-1, 2) for node in gates):
        return False
    if {size(v, -1) for node in mlp.between for v in node.outputs} - {mlp.hidden, wide}:
        return False
    return all(
        size(value, -1) in (1, size(_data(node), -1))
        for node in mlp.between
        if node.op_type != "Split"
        for value in node.inputs
        if value is not None and value.shape is not None and len(value.shape) > 0
    )


def _data(node: ir.Node) -> ir.Value:
    """Return the first input of a node that is not constant."""
    return next(v for v in node.inputs if v is not None and constant(v) is None)


def prune_channels(
    model: ir.Model,
    fraction: float,
    exclude: Sequence[str],
    feeds: Sequence[Feeds],
    *,
    multiple: int = 8,
) -> list[Removed]:
    """Remove a fraction of each MLP's hidden channels, those that contribute least to its output.

    The score of channel j is E[h_j ** 2] * ||W_j|| ** 2, where h is the input of the second layer
    and W_j its weights for that channel: the expected square of the channel's contribution.

    Args:
        model: edited in place.
        fraction: fraction of hidden channels to remove, 0 to 1.
        exclude: fnmatch patterns of the names of layers that are not pruned.
        feeds: recorded inputs of the graph.
        multiple: the number of remaining channels is rounded up to a multiple of this.
    """
    candidates = [
        mlp
        for mlp in mlps(model.graph, exclude)
        if _remaining(mlp.hidden, fraction, multiple) < mlp.hidden
    ]
    if not candidates:
        return []
    check_feeds(feeds, "pruning of channels")
    squares = mean_squares(model, {str(m.second.input.name): -1 for m in candidates}, feeds)
    removed = []
    for mlp in candidates:
        scores = squares[str(mlp.second.input.name)] * _norms(mlp.second)
        remaining = _remaining(mlp.hidden, fraction, multiple)
        order = np.argsort(-scores, kind="stable")
        before = parameters(model.graph)
        narrow_channels(model.graph, mlp, np.sort(order[:remaining]))
        common.RemoveUnusedNodesPass()(model)
        count, cost = before - parameters(model.graph), float(scores[order[remaining:]].sum())
        removed.append(Removed(kind="channels", name=mlp.name, score=cost, parameters=count))
    return removed


def _remaining(hidden: int, fraction: float, multiple: int) -> int:
    return min(hidden, max(1, -(-int(hidden - fraction * hidden) // multiple)) * multiple)


def _norms(layer: GraphLayer) -> NDArray[np.float64]:
    """Return the squared norm of each input channel's weights."""
    weight = layer.array.astype(np.float64)
    return np.asarray(np.square(weight).sum(axis=1 - layer.in_axis))


def narrow_channels(graph: ir.Graph, mlp: Mlp, indices: Indices) -> None:
    """Keep a subset of an MLP's hidden channels, in place."""
    gated = mlp.first.array.shape[mlp.first.out_axis] != mlp.hidden
    wide = np.concatenate([indices, mlp.hidden + indices]) if gated else indices
    kept = {mlp.hidden: indices, mlp.first.array.shape[mlp.first.out_axis]: wide}
    for node in mlp.between:
        _narrow_node(graph, node, kept)
    take_outputs(graph, mlp.first, wide)
    take(graph, mlp.second.node, 1, indices, mlp.second.in_axis)
    for node in mlp.between:
        for value in node.outputs:
            resize(value, len(kept[size(value, -1)]))


def _narrow_node(graph: ir.Graph, node: ir.Node, kept: dict[int, Indices]) -> None:
    """Keep a subset of the channels of a node's constants; a Split gets new sizes.

    Args:
        graph: the graph.
        node: a node between the layers of an MLP.
        kept: indices of the channels to keep, by number of channels: hidden, or twice that.
    """
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if array is None:
            continue
        if node.op_type == "Split":
            half = kept[size(node.outputs[0], -1)]
            replace(graph, node, index, np.full(2, len(half), np.int64))
        elif array.ndim and array.shape[-1] > 1:
            take(graph, node, index, kept[array.shape[-1]], -1)
