"""Slicing of weights: keep a subset of the channels of constants, layers and shapes."""

from itertools import count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import GraphLayer, constant, set_weight

__all__ = ["Indices", "replace", "resize", "single_user", "size", "take", "take_outputs"]

Indices = NDArray[np.int64]


def replace(graph: ir.Graph, node: ir.Node, index: int, array: NDArray[np.generic]) -> None:
    """Replace a constant input of a node; it keeps its name unless other nodes use it too."""
    value = node.inputs[index]
    assert value is not None
    if value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
        value.shape = ir.Shape(array.shape)
        return
    names = (f"{value.name}_{number}" for number in count(2))
    name = next(name for name in names if name not in graph.initializers)
    set_weight(graph, node, index, array, name)


def take(graph: ir.Graph, node: ir.Node, index: int, indices: Indices, axis: int) -> None:
    """Keep a subset of a node's constant input along an axis."""
    array = constant(node.inputs[index])
    assert array is not None
    replace(graph, node, index, np.take(array, indices, axis))


def take_outputs(graph: ir.Graph, layer: GraphLayer, indices: Indices) -> None:
    """Keep a subset of a linear layer's output channels, and of its bias if it is a Gemm."""
    take(graph, layer.node, 1, indices, layer.out_axis)
    if len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None:
        take(graph, layer.node, 2, indices, -1)
    resize(layer.output, len(indices))


def resize(value: ir.Value, size: int, axis: int = -1) -> None:
    """Set the size of an axis in the shape of a value."""
    if value.shape is not None:
        dims = list(value.shape)
        dims[axis] = size
        value.shape = ir.Shape(dims)


def size(value: ir.Value, axis: int) -> int:
    """Return the size of an axis of a value, 0 if it is unknown or free."""
    dimension = value.shape[axis] if value.shape is not None and len(value.shape) else 0
    return dimension if isinstance(dimension, int) else 0


def single_user(value: ir.Value) -> ir.Node | None:
    """Return the node that uses a value, None if there are several or it is a graph output."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None
