"""Give MultiHeadAttention its query, key and value from one product of packed weights.

The layout is that of ONNX Runtime's own script for UNets: (batch, tokens, heads, 3, channels) for
self attention, (batch, tokens, heads, 2, channels) of key and value for cross attention. Only the
CUDA kernel takes it, and is meant for float16.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.passes.rewriting import (
    MICROSOFT,
    Editor,
    dim,
    is_channel_vector,
    lazy_tensor,
    producer_of,
    remove_unused,
    scope_of,
)

__all__ = ["pack_attention"]


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """x @ weight [+ bias]."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape.numpy()) if self.weight.shape is not None else ()


def pack_attention(model: ir.Model) -> int:
    """Pack the projections of each attention that share an input."""
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if node.op_type == "MultiHeadAttention" and node.domain == MICROSOFT:
            count += _pack(editor, node)
    remove_unused(model)
    return count


def _pack(editor: Editor, node: ir.Node) -> bool:
    if len(node.inputs) < 3 or any(value is not None for value in node.inputs[3:5]):
        return False
    query, key, value = (_linear(item) for item in node.inputs[:3])
    if key is None or value is None or not _alike(key, value):
        return False
    if query is not None and _alike(query, key):
        packed = _product(editor, node, [query, key, value])
        inputs: list[ir.Value | None] = [packed, None, None]
    else:
        inputs = [node.inputs[0], _product(editor, node, [key, value]), None]
    for place, item in enumerate(inputs):
        node.replace_input_with(place, item)
    return True


def _alike(one: _Linear, other: _Linear) -> bool:
    same = one.x is other.x and one.shape == other.shape
    return same and (one.bias is None) == (other.bias is None)


def _linear(value: ir.Value | None) -> _Linear | None:
    bias: ir.Value | None = None
    if (added := producer_of(value, "Add")) is not None and value is not None:
        channels = dim(value, -1)
        for x, candidate in (added.inputs, added.inputs[::-1]):
            if isinstance(channels, int) and is_channel_vector(candidate, channels, 0):
                value, bias = x, candidate
    product = producer_of(value, "MatMul")
    if product is None or product.inputs[0] is None or product.inputs[1] is None:
        return None
    x, weight = product.inputs[0], product.inputs[1]
    constant = weight.is_initializer() and not weight.is_graph_input()
    return (
        _Linear(x=x, weight=weight, bias=bias)
        if constant and len(weight.shape or ()) == 2
        else None
    )


def _product(editor: Editor, node: ir.Node, linears: list[_Linear]) -> ir.Value:
    """One product for several, reshaped to (batch, tokens, heads, len(linears), channels)."""
    heads = node.attributes.get_int("num_heads", 1)
    rows, columns = linears[0].shape
    scope = f"{scope_of(node)}.to_{'qkv' if len(linears) == 3 else 'kv'}"
    count, x = len(linears), linears[0].x
    shape = [*(x.shape or ())][:2]

    def packed(*arrays: NDArray[np.generic]) -> NDArray[np.generic]:
        cut = [array.reshape(-1, heads, columns // heads) for array in arrays]
        return np.stack(cut, axis=2)

    weights = [linear.weight for linear in linears]
    weight = editor.add_initializer(
        f"{scope}/weight", lazy_tensor(packed, weights, (rows, count * columns))
    )
    result = editor.add(
        "MatMul", [x, weight], before=node, scope=scope, shape=[*shape, count * columns]
    )
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases:
        bias = editor.add_initializer(
            f"{scope}/bias", lazy_tensor(packed, biases, (count * columns,))
        )
        result = editor.add("Add", [result, bias], before=node, scope=scope, shape=result.shape)
    target = np.array([0, 0, heads, count, columns // heads], np.int64)
    return editor.add(
        "Reshape",
        [result, editor.add_initializer(f"{scope}/shape", target)],
        before=node,
        scope=scope,
        shape=[*shape, heads, count, columns // heads],
    )
