"""Remove hidden channels of MLPs: GEGLU of UNets, GELU and QuickGELU of text encoders."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import GraphLayer, constant, layers, matches, module
from latentforge.optimize.prune.averages import mean_squares, need_feeds
from latentforge.optimize.prune.blocks import parameters
from latentforge.optimize.prune.records import Removed
from latentforge.optimize.prune.slicing import Indices, replace, resize, size, take, take_outputs
from latentforge.runtime.tensor import Feeds

__all__ = ["Mlp", "mlps", "prune_channels"]

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
"""What may lie between the layers of an MLP: operators that leave channels apart."""


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Two linear layers over tokens, with an activation between them.

    Attributes:
        first: gives ``hidden`` channels, or twice as many: values, then their gates.
        second: takes ``hidden`` channels.
        between: the nodes from one to the other.
        hidden: how many channels there are.
    """

    first: GraphLayer
    second: GraphLayer
    between: tuple[ir.Node, ...]
    hidden: int

    @property
    def name(self) -> str:
        return module(self.first.name)


def mlps(graph: ir.Graph, keep: Sequence[str] = ()) -> list[Mlp]:
    """Every MLP whose hidden channels nothing else uses, in the order of the graph."""
    linear = {layer.node: layer for layer in layers(graph) if layer.linear}
    found = (_mlp(layer, linear) for layer in linear.values() if len(layer.input.shape or ()) > 2)
    return [
        mlp
        for mlp in found
        if mlp is not None
        and not any(matches(layer.name, keep) for layer in (mlp.first, mlp.second))
    ]


def _mlp(second: GraphLayer, linear: dict[ir.Node, GraphLayer]) -> Mlp | None:
    """Follow a layer's input back to the one layer that it is computed from."""
    between: list[ir.Node] = []
    sources: set[ir.Node] = set()
    open_ = [second.input]
    while open_:
        node = open_.pop().producer()
        if node in linear:
            sources.add(node)
        elif node is None or node.op_type not in _CHANNELWISE:
            return None
        elif node not in between:
            between.append(node)
            open_ += [v for v in node.inputs if v is not None and constant(v) is None]
    hidden = second.array.shape[second.in_axis]
    if len(sources) != 1:
        return None
    mlp = Mlp(first=linear[sources.pop()], second=second, between=tuple(between), hidden=hidden)
    return mlp if _closed(mlp) and _sound(mlp) else None


def _closed(mlp: Mlp) -> bool:
    """Whether what lies between is used nowhere else."""
    inside = {*mlp.between, mlp.second.node}
    values = [mlp.first.output, *(value for node in mlp.between for value in node.outputs)]
    return all(inside.issuperset(v.consumers()) and not v.is_graph_output() for v in values)


def _sound(mlp: Mlp) -> bool:
    """Whether every width is known to be that of the hidden channels, or twice that at a gate."""
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
    """The first input of a node that is not constant."""
    return next(v for v in node.inputs if v is not None and constant(v) is None)


def prune_channels(
    model: ir.Model,
    share: float,
    keep: Sequence[str],
    feeds: Sequence[Feeds],
    *,
    multiple: int = 8,
) -> list[Removed]:
    """Remove the share of each MLP's hidden channels that adds least to its output.

    The score of channel j is E[h_j ** 2] * ||W_j|| ** 2, with h the input of the second layer and
    W_j its weights for that channel: the expected square of what the channel adds to the output.

    Args:
        model: edited in place.
        share: of hidden channels, from 0 to 1.
        keep: patterns, as of fnmatch, of names of layers that stay.
        feeds: recorded inputs of the graph.
        multiple: as many channels stay as is the next multiple of this, for kernels' sake.
    """
    found = [m for m in mlps(model.graph, keep) if _staying(m.hidden, share, multiple) < m.hidden]
    if not found:
        return []
    need_feeds(feeds, "pruning of channels")
    squares = mean_squares(model, {str(m.second.input.name): -1 for m in found}, feeds)
    removed = []
    for mlp in found:
        scores = squares[str(mlp.second.input.name)] * _norms(mlp.second)
        staying = _staying(mlp.hidden, share, multiple)
        order = np.argsort(-scores, kind="stable")
        before = parameters(model.graph)
        _narrow(model.graph, mlp, np.sort(order[:staying]))
        common.RemoveUnusedNodesPass()(model)
        gone, cost = before - parameters(model.graph), float(scores[order[staying:]].sum())
        removed.append(Removed(kind="channels", name=mlp.name, score=cost, parameters=gone))
    return removed


def _staying(hidden: int, share: float, multiple: int) -> int:
    return min(hidden, max(1, -(-int(hidden - share * hidden) // multiple)) * multiple)


def _norms(layer: GraphLayer) -> NDArray[np.float64]:
    """By input channel, the squared norm of its weights."""
    weight = layer.array.astype(np.float64)
    return np.asarray(np.square(weight).sum(axis=1 - layer.in_axis))


def _narrow(graph: ir.Graph, mlp: Mlp, indices: Indices) -> None:
    """Keep only some hidden channels."""
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
    """Take channels out of a node's constants; a Split gets new sizes."""
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if array is None:
            continue
        if node.op_type == "Split":
            half = kept[size(node.outputs[0], -1)]
            replace(graph, node, index, np.full(2, len(half), np.int64))
        elif array.ndim and array.shape[-1] > 1:
            take(graph, node, index, kept[array.shape[-1]], -1)
