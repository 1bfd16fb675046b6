"""Products in bfloat16: weights of latentforge's own operators in the layout of their kernels.

``Conv`` and ``MatMul`` of runtime/kernels round their inputs to bfloat16 if their weights are in
it, and sum in float32. Everything else of a graph stays in float32: norms, softmax and
activations, and what is added to a sum.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.half.selection import time_path
from latentforge.runtime.kernels import DOMAIN

__all__ = ["GROUP", "compute_bf16", "pack_bf16", "stored_precision"]

GROUP = 32
"""Input channels that packed weights in bfloat16 are padded to."""

_WEIGHT = 1  # input of Conv and MatMul
_DTYPE = ir.DataType.BFLOAT16


def compute_bf16(model: ir.Model) -> int:
    """Give latentforge's Conv and MatMul weights in bfloat16, so that they multiply in it.

    ::

        x, weight (float32) ─ latentforge.Conv or MatMul ─ y
     ->
        x, weight' (bfloat16, in pairs) ─ latentforge.Conv or MatMul ─ y

    Nodes computed from ``TIME_INPUTS`` alone stay in float32: they run once for each timestep.

    Returns:
        The number of weights converted.
    """
    graph = model.graph
    spared = time_path(graph)
    weights = [value for value in graph.initializers.values() if _convertible(value, spared)]
    for value in weights:
        _convert(graph, value)
    return len(weights)


def stored_precision(model: ir.Model, precision: str) -> str:
    """Return a recipe's precision, or fp16 for bf16 where no product of a graph is in bfloat16.

    That is so for the parts that run once for each timestep, whose weights ``store_half`` stores.
    """
    dtypes = {value.dtype for value in model.graph.initializers.values()}
    return "fp16" if precision == "bf16" and _DTYPE not in dtypes else precision


def _convertible(value: ir.Value, spared: set[ir.Node]) -> bool:
    """Return True if all users of a float32 constant take it as a weight in bfloat16."""
    uses = list(value.uses())
    return (
        bool(uses)
        and value.const_value is not None
        and value.dtype == ir.DataType.FLOAT
        and not value.is_graph_input()
        and not value.is_graph_output()
        and all(_takes_weight(use.node, use.idx) and use.node not in spared for use in uses)
    )


def _takes_weight(node: ir.Node, index: int) -> bool:
    return node.domain == DOMAIN and node.op_type in ("Conv", "MatMul") and index == _WEIGHT


def _convert(graph: ir.Graph, value: ir.Value) -> None:
    """Replace a packed weight by one in bfloat16, which is computed when the graph is written."""
    name, tensor = str(value.name), value.const_value
    assert tensor is not None
    blocks, inputs, *kernel, lanes = tensor.shape.numpy()
    shape = ir.Shape([blocks, *kernel, -(-inputs // GROUP) * GROUP // 2, 2 * lanes])

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(pack_bf16(tensor.numpy()), name=name)

    lazy = ir.LazyTensor(evaluate, _DTYPE, shape, name=name)
    packed = ir.Value(name=name, shape=shape, type=ir.TensorType(_DTYPE), const_value=lazy)
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, packed)
    del graph.initializers[name]
    graph.register_initializer(packed)


def pack_bf16(packed: NDArray[np.float32]) -> NDArray[np.generic]:
    """Return packed weights in bfloat16, in pairs of input channels: see runtime/kernels/kernels.h.

    Args:
        packed: (blocks, in, height, width, 16), as ``native/conv.py`` packs them.

    Returns:
        (blocks, height, width, pairs, 32), rounded to the nearest and to even. Input channel c is
        number c % 2 of pair c // 2, and there are zeros up to a multiple of 32 channels.
    """
    blocks, inputs, height, width, lanes = packed.shape
    missing = -inputs % GROUP
    whole = np.pad(packed, [(0, 0), (0, missing), (0, 0), (0, 0), (0, 0)])
    pairs = whole.reshape(blocks, -1, 2, height, width, lanes).transpose(0, 3, 4, 1, 5, 2)
    return pairs.reshape(blocks, height, width, -1, 2 * lanes).astype(_DTYPE.numpy())
