"""SmoothQuant: move differences between channels from activations to weights, in float.

Xiao et al. (2022), "SmoothQuant", arXiv 2211.10438, equations 3 and 4. An activation has one scale
for all channels, so that one channel of large values costs all others precision; weights have a
scale per output channel and can take the factors s of the input channels:

    before                                    after

    LayerNorm(g, b) ─► x ─► MatMul(w)         LayerNorm(g/s, b/s) ─► x/s ─► MatMul(s*w)

    Gelu ─► x ─► MatMul(w)                    Gelu ─► x ─► Mul(1/s) ─► MatMul(s*w)

The second form costs time, and is used only if the settings say so.
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
"""Indices of the inputs that hold each operator's scale and bias."""


def smooth(
    graph: ir.Graph,
    chosen: Sequence[GraphLayer],
    maxima: Mapping[ir.Value, Array],
    alpha: float,
    *,
    insert_mul: bool,
) -> int:
    """Divide inputs of linear layers by a factor per channel, and multiply their weights by it.

    Layers with a common input share the factors. If only linear layers read the output of a
    normalization, its constants absorb the factors, and the weights of all its readers are
    multiplied, also of those that stay in float. Otherwise a Mul is needed. The graph computes the
    same function as before.

    Args:
        graph: changed in place.
        chosen: linear layers to smooth.
        maxima: by input of a layer, the (channels,) largest magnitudes.
        alpha: migration strength; 0 moves nothing, 1 moves all differences.
        insert_mul: insert a Mul where no normalization absorbs the factors.

    Returns:
        The number of layers that were smoothed.
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
        factors = _factors(group, maxima[value], alpha)
        folded = _fold(graph, value, readers[value], factors)
        if folded or insert_mul:
            count += len(group)
            for layer in readers[value] if folded else group:
                _multiply(graph, layer, factors)
        if not folded and insert_mul:
            _divide(graph, value, group, factors)
    return count


def _factors(group: Sequence[GraphLayer], maxima: Array, alpha: float) -> NDArray[np.float32]:
    """Return equation 4, s = max |x|^alpha / max |w|^(1 - alpha), by input channel.

    The factor is 1 for channels that are always zero or have no weights.
    """
    layer_maxima = [np.abs(layer.array).max(axis=layer.out_axis) for layer in group]
    weights = np.max(layer_maxima, axis=0).astype(np.float64)
    live = (maxima > 0) & (weights > 0)
    x, w = np.where(live, maxima, 1), np.where(live, weights, 1)
    return np.asarray(x**alpha / w ** (1 - alpha), np.float32)


def _multiply(graph: ir.Graph, layer: GraphLayer, factors: Array) -> None:
    """Multiply a weight by one factor per input channel."""
    shape = [1, 1]
    shape[layer.in_axis] = -1
    scaled = layer.array * factors.reshape(shape)
    set_weight(graph, layer.node, 1, scaled, f"{layer.weight.name}.smooth")


def _divide(graph: ir.Graph, value: ir.Value, group: Sequence[GraphLayer], factors: Array) -> None:
    """Insert a Mul that divides the input of a group of layers by one factor per channel."""
    inverse = add_constant(graph, (1 / factors).astype(np.float32), f"{value.name}.smooth")
    first = group[0].node
    product = add_node(first, "Mul", [value, inverse], name=module(group[0].name), like=value)
    for layer in group:
        layer.node.replace_input_with(0, product)


def _fold(graph: ir.Graph, value: ir.Value, readers: Sequence[GraphLayer], factors: Array) -> bool:
    """Divide the constants of a normalization by factors, in place.

    The normalization is one node, or ends in x * scale + bias:

        LayerNormalization(x, g, b)     ... ─► Mul(g) ─► Add(b)
                                                    g and b are divided

    Returns:
        True if there is a normalization that only these layers read, and its constants are
        (channels,).
    """
    reader_nodes = {layer.node for layer in readers}
    if value.is_graph_output() or any(user not in reader_nodes for user, _ in value.uses()):
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
    """Return the nodes and input indices of scale and bias in x * scale + bias.

    Args:
        node: the Add.

    Returns:
        An empty list for other nodes, and where something else reads the product.
    """
    if node.op_type != "Add":
        return []
    bias = next((i for i, v in enumerate(node.inputs) if constant(v) is not None), None)
    scaled = None if bias is None else node.inputs[1 - bias]
    product = None if scaled is None else scaled.producer()
    if bias is None or scaled is None or product is None or product.op_type != "Mul":
        return []
    scale = next((i for i, v in enumerate(product.inputs) if constant(v) is not None), None)
    if scale is None or len(scaled.uses()) > 1 or scaled.is_graph_output():
        return []
    return [(product, scale), (node, bias)]
