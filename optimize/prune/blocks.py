"""Prune residual branches: attention, MLPs, whole transformer blocks, resnets.

A candidate is an Add of a value and a function of it, skip + branch(skip). Removing it replaces the
sum by the skip connection:

    before                                  after

    x ─┬─► norm ─► attention ─► Add ─► y    x ─► y
       └────────── skip ─────────┘

Branches may be nested: that of a transformer block contains those of its attention and its MLP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import add_constant, layers, matches, open_session
from latentforge.optimize.prune.averages import check_feeds
from latentforge.optimize.prune.records import Removed
from latentforge.runtime.tensor import Feeds

__all__ = ["Branch", "branches", "parameters", "prune_blocks"]

_SWITCHES = "switches"


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Residual branch.

    Attributes:
        add: the Add that joins branch and skip connection.
        side: index of the Add's input that is the branch.
        nodes: nodes that are not needed without the branch, with the Add and nested branches.
    """

    add: ir.Node
    side: int
    nodes: frozenset[ir.Node]

    @property
    def skip(self) -> ir.Value:
        """Value of the skip connection."""
        value = self.add.inputs[1 - self.side]
        assert value is not None
        return value

    @property
    def name(self) -> str:
        """Name of the innermost module that contains all of its weights."""
        weighted = [layer for layer in layers(_graph(self.add)) if layer.node in self.nodes]
        paths = [layer.name.rpartition("/")[0].split(".") for layer in weighted]
        return ".".join(commonprefix(paths)) or str(self.add.name)


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def parameters(graph: ir.Graph, nodes: frozenset[ir.Node] | None = None) -> int:
    """Count a graph's floating point weights.

    Args:
        graph: the graph.
        nodes: count only the weights that no other nodes use.
    """
    return sum(
        value.const_value.size
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and (nodes is None or (value.uses() and nodes.issuperset(value.consumers())))
    )


def branches(graph: ir.Graph, exclude: Sequence[str] = ()) -> list[Branch]:
    """Find all residual branches with weights, in the order of the graph.

    Args:
        graph: graph in which norms are not fused with the Adds in front of them.
        exclude: fnmatch patterns of the names of nodes that may not be removed.
    """
    candidates = []
    for node in graph:
        side = _branch_side(node)
        if side is None:
            continue
        nodes = frozenset(_dead_without(node, side))
        excluded = any(matches(str(n.name), exclude) for n in nodes - {node})
        if not excluded and parameters(graph, nodes):
            candidates.append(Branch(add=node, side=side, nodes=nodes))
    return candidates


def _branch_side(node: ir.Node) -> int | None:
    """Return the index of an Add's input that is computed from the other one.

    Returns:
        None if there is none, or the sum broadcasts, so that the skip cannot replace it.
    """
    if node.op_type != "Add" or node.domain:
        return None
    left, right = node.inputs
    if left is None or right is None or not _same_shape(left, right, node.outputs[0]):
        return None
    for side, (branch, skip) in enumerate([(left, right), (right, left)]):
        if branch is not skip and _depends(branch, skip):
            return side
    return None


def _same_shape(left: ir.Value, right: ir.Value, output: ir.Value) -> bool:
    shapes = left.shape, right.shape, output.shape
    return None not in shapes and shapes[0] == shapes[1] == shapes[2]


def _depends(value: ir.Value, source: ir.Value) -> bool:
    """Return True if a value is computed from a source."""
    visited, pending = set(), [value]
    while pending:
        producer = pending.pop().producer()
        if producer is None or producer in visited:
            continue
        if any(operand is source for operand in producer.inputs):
            return True
        visited.add(producer)
        pending += [operand for operand in producer.inputs if operand is not None]
    return False


def _dead_without(add: ir.Node, side: int) -> set[ir.Node]:
    """Return the nodes that are dead code once the skip connection replaces an Add."""
    dead = {add}
    pending = [add.inputs[side]]
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is None or node in dead or value is add.inputs[1 - side]:
            continue
        users = {user for output in node.outputs for user in output.consumers()}
        if users <= dead and not any(output.is_graph_output() for output in node.outputs):
            dead.add(node)
            pending += list(node.inputs)
    return dead


def prune_blocks(
    model: ir.Model, fraction: float, exclude: Sequence[str], feeds: Sequence[Feeds]
) -> list[Removed]:
    """Remove the branches of lowest score per weight, up to a fraction of all weights.

    The score of a branch is the mean squared change of the graph's output without it, and scores
    are assumed to be additive: the one-shot criterion of LAPTOP-Diff (Zhang et al. 2024, arXiv
    2404.11098, section 3.2). Branches are chosen greedily by score per weight while they fit. A
    branch that contains removed ones counts with its whole score and its remaining weights.

    Args:
        model: edited in place; its residual sums are not fused.
        fraction: fraction of the graph's weights that may be removed, 0 to 1.
        exclude: fnmatch patterns of the names of nodes that may not be removed.
        feeds: recorded inputs of the graph; each is run once per candidate.
    """
    candidates = branches(model.graph, exclude)
    if not candidates:
        return []
    check_feeds(feeds, "pruning of blocks")
    scores = _scores(model, candidates, feeds)
    chosen = _chosen(model.graph, candidates, scores, fraction)
    for branch, _ in chosen:
        _remove(branch)
    common.RemoveUnusedNodesPass()(model)
    return [removed for _, removed in chosen]


def _chosen(
    graph: ir.Graph, candidates: Sequence[Branch], scores: NDArray[np.float64], fraction: float
) -> list[tuple[Branch, Removed]]:
    """Choose branches greedily, the least important first.

    Branches nested in a chosen one are no longer candidates.
    """
    budget = fraction * parameters(graph)
    removed: frozenset[ir.Node] = frozenset()
    chosen: list[tuple[Branch, Removed]] = []
    while (best := _best(graph, candidates, scores, removed, budget)) is not None:
        index, size = best
        branch, score = candidates[index], float(scores[index])
        chosen.append(
            (branch, Removed(kind="block", name=branch.name, score=score, parameters=size))
        )
        budget, removed = budget - size, removed | branch.nodes
    return chosen


def _best(
    graph: ir.Graph,
    candidates: Sequence[Branch],
    scores: NDArray[np.float64],
    removed: frozenset[ir.Node],
    budget: float,
) -> tuple[int, int] | None:
    """Return the index of the candidate with the lowest score per weight that fits, and its size.

    Of equal candidates it is the largest, so that a useless branch is removed as a whole.
    """
    before = parameters(graph, removed)
    options = []
    for index, branch in enumerate(candidates):
        size = 0 if branch.add in removed else parameters(graph, removed | branch.nodes) - before
        if 0 < size <= budget:
            options.append((float(scores[index]) / size, -size, index))
    return (min(options)[2], -min(options)[1]) if options else None


def _remove(branch: Branch) -> None:
    """Replace the sum by the skip connection."""
    output = branch.add.outputs[0]
    if output.is_graph_output():  # keeps its name
        _graph(branch.add).insert_after(branch.add, identity := ir.node("Identity", [branch.skip]))
        name, output.name = output.name, f"{output.name}_pruned"
        identity.outputs[0].name = name
        identity.outputs[0].type, identity.outputs[0].shape = output.type, output.shape
        ir.convenience.replace_all_uses_with(
            output, identity.outputs[0], replace_graph_outputs=True
        )
    else:
        ir.convenience.replace_all_uses_with(output, branch.skip)


def _scores(
    model: ir.Model, candidates: Sequence[Branch], feeds: Sequence[Feeds]
) -> NDArray[np.float64]:
    """Return the mean squared change of the outputs without each candidate alone."""
    switched = _switched(model, candidates)
    count = len(candidates)
    settings = np.vstack([np.ones(count), 1 - np.eye(count)]).astype(np.float32)
    totals = np.zeros(count)
    session = open_session(switched)
    for feed in feeds:
        whole, *without = ([*session.run(None, {**feed, _SWITCHES: row})] for row in settings)
        totals += [_difference(whole, outputs) for outputs in without]
    return totals / len(feeds)


def _difference(
    whole: Sequence[NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]]
) -> float:
    pairs = [
        (a.astype(np.float64), b.astype(np.float64)) for a, b in zip(whole, outputs, strict=True)
    ]
    return sum(float(np.mean(np.square(a - b))) for a, b in pairs)


def _switched(model: ir.Model, candidates: Sequence[Branch]) -> ir.Model:
    """Return a copy of a model with an input (candidates,) that scales each branch by 1 or 0.

    before:  skip ─► Add ◄─ branch
    after:   skip ─► Add ◄─ Mul ◄─ branch
                             ▲
             switches ─► Gather(index)
    """
    copy = model.clone()
    adds = {node.outputs[0].name: node for node in copy.graph if node.op_type == "Add"}
    switches = ir.Value(
        name=_SWITCHES,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([len(candidates)]),
    )
    copy.graph.inputs.append(switches)
    for index, branch in enumerate(candidates):
        add = adds[branch.add.outputs[0].name]
        number = add_constant(copy.graph, np.array(index, np.int64), f"{_SWITCHES}_{index}")
        switch = ir.node("Gather", [switches, number])
        scaled = ir.node("Mul", [add.inputs[branch.side], switch.outputs[0]])
        copy.graph.insert_before(add, [switch, scaled])
        add.replace_input_with(branch.side, scaled.outputs[0])
    return copy
