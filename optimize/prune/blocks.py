"""Remove residual branches: of attention, MLPs, whole transformers, resnets.

A candidate is an Add of a value and something computed from it, skip + branch(skip). To remove it
is to go on with skip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import add_constant, layers, matches, open_session
from latentforge.optimize.prune.averages import need_feeds
from latentforge.optimize.prune.records import Removed
from latentforge.runtime.tensor import Feeds

__all__ = ["Branch", "branches", "parameters", "prune_blocks"]

_SWITCHES = "switches"


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A residual branch.

    Attributes:
        add: where it ends; the node that goes.
        side: which input of it is the branch.
        nodes: all that nobody needs without it, the Add included; a branch inside of it is a
            part of them.
    """

    add: ir.Node
    side: int
    nodes: frozenset[ir.Node]

    @property
    def skip(self) -> ir.Value:
        value = self.add.inputs[1 - self.side]
        assert value is not None
        return value

    @property
    def name(self) -> str:
        """The module that holds its weights."""
        weighted = [layer for layer in layers(_graph(self.add)) if layer.node in self.nodes]
        paths = [layer.name.rpartition("/")[0].split(".") for layer in weighted]
        return ".".join(commonprefix(paths)) or str(self.add.name)


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def parameters(graph: ir.Graph, nodes: frozenset[ir.Node] | None = None) -> int:
    """How many floating point weights a graph has, or those of them that only some nodes use."""
    return sum(
        value.const_value.size
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and (nodes is None or (value.uses() and nodes.issuperset(value.consumers())))
    )


def branches(graph: ir.Graph, keep: Sequence[str] = ()) -> list[Branch]:
    """Every residual branch with weights, in the order of the graph.

    Args:
        graph: before norms were fused with the Adds in front of them.
        keep: patterns, as of fnmatch, of names of nodes that no branch to remove may hold.
    """
    found = []
    for node in graph:
        side = _branch_side(node)
        if side is None:
            continue
        nodes = frozenset(_dead_without(node, side))
        kept = any(matches(str(n.name), keep) for n in nodes - {node})
        if not kept and parameters(graph, nodes):
            found.append(Branch(add=node, side=side, nodes=nodes))
    return found


def _branch_side(node: ir.Node) -> int | None:
    """Which input of an Add is computed from the other, if shapes allow to leave it out."""
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
    seen, open_ = set(), [value]
    while open_:
        producer = open_.pop().producer()
        if producer is None or producer in seen:
            continue
        if any(given is source for given in producer.inputs):
            return True
        seen.add(producer)
        open_ += [given for given in producer.inputs if given is not None]
    return False


def _dead_without(add: ir.Node, side: int) -> set[ir.Node]:
    """The nodes that nobody needs once the users of an Add take its skip instead."""
    dead = {add}
    open_ = [add.inputs[side]]
    while open_:
        value = open_.pop()
        node = None if value is None else value.producer()
        if node is None or node in dead or value is add.inputs[1 - side]:
            continue
        users = {user for output in node.outputs for user in output.consumers()}
        if users <= dead and not any(output.is_graph_output() for output in node.outputs):
            dead.add(node)
            open_ += list(node.inputs)
    return dead


def prune_blocks(
    model: ir.Model, share: float, keep: Sequence[str], feeds: Sequence[Feeds]
) -> list[Removed]:
    """Remove the branches that matter least for what they weigh, up to a share of all weights.

    A branch's score is the mean squared difference that leaving it out makes to the graph's
    output, and scores are taken to add up: the one-shot criterion of LAPTOP-Diff (Zhang et al.
    2024, arXiv 2404.11098, section 3.2). Taken are, while they fit, those of the lowest score a
    weight; one that holds branches already gone counts with its whole score and what is left of
    its weights.

    Args:
        model: edited in place; with unfused residual sums.
        share: of the graph's weights that may go, from 0 to 1.
        keep: patterns of names of nodes that stay.
        feeds: recorded inputs of the graph; each is run once a candidate.
    """
    candidates = branches(model.graph, keep)
    if not candidates:
        return []
    need_feeds(feeds, "pruning of blocks")
    scores = _scores(model, candidates, feeds)
    chosen = _chosen(model.graph, candidates, scores, share)
    for branch, _ in chosen:
        _remove(branch)
    common.RemoveUnusedNodesPass()(model)
    return [removed for _, removed in chosen]


def _chosen(
    graph: ir.Graph, candidates: Sequence[Branch], scores: NDArray[np.float64], share: float
) -> list[tuple[Branch, Removed]]:
    """Which go, the least important first; a branch inside one that goes is no longer one."""
    left = share * parameters(graph)
    gone: frozenset[ir.Node] = frozenset()
    chosen: list[tuple[Branch, Removed]] = []
    while (best := _best(graph, candidates, scores, gone, left)) is not None:
        index, size = best
        branch, score = candidates[index], float(scores[index])
        chosen.append(
            (branch, Removed(kind="block", name=branch.name, score=score, parameters=size))
        )
        left, gone = left - size, gone | branch.nodes
    return chosen


def _best(
    graph: ir.Graph,
    candidates: Sequence[Branch],
    scores: NDArray[np.float64],
    gone: frozenset[ir.Node],
    left: float,
) -> tuple[int, int] | None:
    """The index of the candidate with the lowest score a weight that still fits, and its size.

    Of equals it is the largest, so that a useless branch goes with all that it holds.
    """
    before = parameters(graph, gone)
    options = []
    for index, branch in enumerate(candidates):
        size = 0 if branch.add in gone else parameters(graph, gone | branch.nodes) - before
        if 0 < size <= left:
            options.append((float(scores[index]) / size, -size, index))
    return (min(options)[2], -min(options)[1]) if options else None


def _remove(branch: Branch) -> None:
    """Let the users of the sum take the skip."""
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
    """By candidate, the mean squared difference of the outputs when it alone is left out."""
    switched = _switched(model, candidates)
    count = len(candidates)
    rows = np.vstack([np.ones(count), 1 - np.eye(count)]).astype(np.float32)
    totals = np.zeros(count)
    session = open_session(switched)
    for fed in feeds:
        whole, *without = ([*session.run(None, {**fed, _SWITCHES: row})] for row in rows)
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
    """A copy of a model in which a vector of numbers, 1 or 0, scales each candidate's branch."""
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
