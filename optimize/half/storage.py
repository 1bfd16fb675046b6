"""Store weights in half precision for targets that compute in float32.

A weight becomes a float16 initializer and one Cast, which ONNX Runtime folds when it loads the
file: the file is half as large, and inference costs the same. Loading takes a little longer, and
the memory of both copies while it lasts.
"""

import numpy as np
import onnx_ir as ir

from latentforge.optimize.half.float16 import cast_node, fits, half_initializer
from latentforge.runtime.kernels import DOMAIN

__all__ = ["store_half"]

_SMALL = 1024  # elements: below, a Cast costs more than it saves
_QUANTIZED = ("uantize", "QLinear", "Integer", "NBits")  # in the names of what takes scales


def store_half(model: ir.Model) -> int:
    """Store float32 weights in half precision, each behind one Cast to float32.

    latentforge's own Conv and MatMul take weights in half, and need no Cast.

    These weights stay in float32: those of less than 1024 elements, scales of quantized layers, and
    those that half cannot represent (see ``fits``).

    Returns:
        The number of weights stored in half.
    """
    graph = model.graph
    weights = [value for value in graph.initializers.values() if _storable(value)]
    casts = [_store(graph, value) for value in weights]
    for cast in reversed(casts):
        if cast is not None:
            graph.insert_before(graph[0], cast)
    return len(casts)


def _storable(value: ir.Value) -> bool:
    """Return True if an initializer is a float32 weight that is to be stored in half."""
    tensor = value.const_value
    if tensor is None or value.dtype != ir.DataType.FLOAT or tensor.size < _SMALL:
        return False
    if value.is_graph_input() or value.is_graph_output() or not value.uses():
        return False
    if any(use.idx > 0 and _takes_scales(use.node) for use in value.uses()):
        return False
    return fits(np.asarray(tensor.numpy(), np.float32))


def _takes_scales(node: ir.Node) -> bool:
    """Return True if a node computes with quantized numbers, all shifted by a rounded scale."""
    return any(part in node.op_type for part in _QUANTIZED)


def _takes_half_weight(node: ir.Node, index: int) -> bool:
    """Return True if an input is a weight that the operator takes in half, computing in float32."""
    return node.domain == DOMAIN and node.op_type in ("Conv", "MatMul") and index == 1


def _store(graph: ir.Graph, value: ir.Value) -> ir.Node | None:
    """Replace a weight with a half initializer, behind a Cast if a user needs float32."""
    name, tensor = str(value.name), value.const_value
    assert tensor is not None
    uses = list(value.uses())
    half = half_initializer(name, tensor)
    direct = all(_takes_half_weight(use.node, use.idx) for use in uses)
    cast = None if direct else cast_node(half, ir.DataType.FLOAT, f"{name}/Cast", f"{name}_float32")
    for use in uses:
        use.node.replace_input_with(use.idx, half if cast is None else cast.outputs[0])
    del graph.initializers[name]
    graph.register_initializer(half)
    return cast
