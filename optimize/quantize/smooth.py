"""SmoothQuant: move the spread of activations over channels into the weights, in float.

Xiao et al. (2022), "SmoothQuant", arXiv 2211.10438, equations 3 and 4.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import (
    GraphLayer,
    add_constant,
    constant,
    layers,
    module,
    set_weight,
)
from latentforge.optimize.quantize.nodes import add_node

__all__ = ["smooth"]

Array = NDArray[Any]

_NORMS = {"LayerNormalization": (1, 2), "SkipLayerNormalization": (2, 3)}
"""Where each operator has its scale and its bias."""


def smooth(
    graph: ir.Graph,
    chosen: Sequence[GraphLayer],
    peaks: Mapping[ir.Value, Array],
    alpha: float,
    *,
    everywhere: bool,
) -> int:
    """Divide what goes into linear layers by a factor a channel, and multiply their weights by it.

    Layers that share an input share the factors. These go into the LayerNormalization before where
    only linear layers read it, of which those that stay in float are multiplied too; and into a Mul
    otherwise. The graph computes what it did.

    Args:
        graph: changed in place.
        chosen: linear layers to smooth.
        peaks: (channels,) the largest magnitude of each layer's input.
        alpha: how much of the spread moves.
        everywhere: not only where the factors go into a normalization.

    Returns:
        How many layers were smoothed.
    """
    groups: defaultdict[ir.Value, list[GraphLayer]] = defaultdict(list)
    readers: defaultdict[ir.Value, list[GraphLayer]] = defaultdict(list)
    for layer in chosen:
        groups[layer.input].append(layer)
    for layer in layers(graph):
        if layer.linear:
            readers[layer.input].append(layer)
    count = 0
    for value, group in groups.items():
        factors = _factors(group, peaks[value], alpha)
        folded = _fold(graph, value, readers[value], factors)
        if folded or everywhere:
            count += len(group)
            for layer in readers[value] if folded else group:
                _multiply(graph, layer, factors)
        if not folded and everywhere:
            _divide(graph, value, group, factors)
    return count


def _factors(group: Sequence[GraphLayer], peaks: Array, alpha: float) -> NDArray[np.float32]:
    """Equation 4: s = max |x|^alpha / max |w|^(1 - alpha), by input channel; 1 for dead ones."""
    tops = [np.abs(layer.array).max(axis=layer.out_axis) for layer in group]
    weights = np.max(tops, axis=0).astype(np.float64)
    live = (peaks > 0) & (weights > 0)
    x, w = np.where(live, peaks, 1), np.where(live, weights, 1)
    return np.asarray(x**alpha / w ** (1 - alpha), np.float32)


def _multiply(graph: ir.Graph, layer: GraphLayer, factors: Array) -> None:
    """Multiply a weight by a factor an input channel."""
    shape = [1, 1]
    shape[layer.in_axis] = -1
    scaled = layer.array * factors.reshape(shape)
    set_weight(graph, layer.node, 1, scaled, f"{layer.weight.name}.smooth")


def _divide(graph: ir.Graph, value: ir.Value, group: Sequence[GraphLayer], factors: Array) -> None:
    """Divide an activation by a factor a channel, as far as a group of layers sees it."""
    inverse = add_constant(graph, (1 / factors).astype(np.float32), f"{value.name}.smooth")
    first = group[0].node
    product = add_node(first, "Mul", [value, inverse], name=module(group[0].name), like=value)
    for layer in group:
        layer.node.replace_input_with(0, product)


def _fold(graph: ir.Graph, value: ir.Value, readers: Sequence[GraphLayer], factors: Array) -> bool:
    """Divide the constants of a normalization, written as one node or as Mul and Add.

    Returns:
        Whether there is one that only these layers read.
    """
    known = {layer.node for layer in readers}
    if value.is_graph_output() or any(user not in known for user, _ in value.uses()):
        return False
    node = value.producer()
    if node is None or value is not node.outputs[0]:
        return False
    if node.op_type in _NORMS:
        places = [(node, index) for index in _NORMS[node.op_type]]
    else:
        places = _affine(node)
    places = [(n, i) for n, i in places if i < len(n.inputs) and n.inputs[i] is not None]
    arrays = [constant(n.inputs[i]) for n, i in places]
    if not places or any(array is None or array.shape != factors.shape for array in arrays):
        return False
    for (owner, index), array in zip(places, arrays, strict=True):
        divided = np.asarray(array, np.float32) / factors
        old = owner.inputs[index]
        assert old is not None
        set_weight(graph, owner, index, divided, f"{old.name}.smooth")
    return True


def _affine(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """Where x * scale + bias has its constants, if the node is the sum."""
    if node.op_type != "Add":
        return []
    bias = next((i for i, v in enumerate(node.inputs) if constant(v) is not None), None)
    other = None if bias is None else node.inputs[1 - bias]
    product = None if other is None else other.producer()
    if bias is None or other is None or product is None or product.op_type != "Mul":
        return []
    scale = next((i for i, v in enumerate(product.inputs) if constant(v) is not None), None)
    if scale is None or len(other.uses()) > 1 or other.is_graph_output():
        return []
    return [(product, scale), (node, bias)]
