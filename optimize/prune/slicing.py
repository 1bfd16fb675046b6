"""Take channels out of weights."""

from itertools import count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import GraphLayer, constant, set_weight

__all__ = ["Indices", "replace", "resize", "single_user", "size", "take", "take_outputs"]

Indices = NDArray[np.int64]


def replace(graph: ir.Graph, node: ir.Node, index: int, array: NDArray[np.generic]) -> None:
    """Give a node another constant at an input: under the same name where it alone uses it."""
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
    """Keep only some of a constant input along an axis."""
    array = constant(node.inputs[index])
    assert array is not None
    replace(graph, node, index, np.take(array, indices, axis))


def take_outputs(graph: ir.Graph, layer: GraphLayer, indices: Indices) -> None:
    """Keep only some output channels of a linear layer, and of its bias if it is a Gemm."""
    take(graph, layer.node, 1, indices, layer.out_axis)
    if len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None:
        take(graph, layer.node, 2, indices, -1)
    resize(layer.output, len(indices))


def resize(value: ir.Value, size: int, axis: int = -1) -> None:
    """Note the new size of an axis in the shape of a value."""
    if value.shape is not None:
        dims = list(value.shape)
        dims[axis] = size
        value.shape = ir.Shape(dims)


def size(value: ir.Value, axis: int) -> int:
    """How large an axis of a value is; 0 where that is not known."""
    found = value.shape[axis] if value.shape is not None and len(value.shape) else 0
    return found if isinstance(found, int) else 0


def single_user(value: ir.Value) -> ir.Node | None:
    """The only node that uses a value, if nothing else does."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None
