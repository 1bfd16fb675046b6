"""Compute the query, key and value of MultiHeadAttention in one product of packed weights.

The layout is that of ONNX Runtime's own script for UNets: (batch, tokens, heads, 3, channels) for
self-attention, (batch, tokens, heads, 2, channels) of key and value for cross-attention. Only the
CUDA kernel takes it, and it is meant for float16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from latentforge.optimize.passes.dims import dim
from latentforge.optimize.passes.matching import (
    MICROSOFT,
    Declined,
    find,
    is_channel_vector,
    producer_of,
)
from latentforge.optimize.passes.rewriting import (
    Array,
    Editor,
    lazy_tensor,
    remove_unused,
    scope_of,
)

__all__ = ["pack_attention"]


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """Linear layer x @ weight [+ bias]."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, (inputs, outputs)."""
        return tuple(self.weight.shape.numpy()) if self.weight.shape is not None else ()


@dataclass(frozen=True, kw_only=True)
class _Projections:
    """Projections of an attention that share an input: query, key and value, or the last two.

    Attributes:
        attention: the MultiHeadAttention.
        linears: the projections, in that order.
    """

    attention: ir.Node
    linears: Sequence[_Linear]


def pack_attention(model: ir.Model) -> int:
    """Pack the projections of each attention that share an input.

    ::

            ┌─ MatMul wq ─ [Add bq] ─┐
        x ──┼─ MatMul wk ─ [Add bk] ─┼─ MultiHeadAttention ─ y
            └─ MatMul wv ─ [Add bv] ─┘
     ->
        x ─ MatMul wqkv ─ [Add bqkv] ─ Reshape (b,s,h,3,d) ─ MultiHeadAttention ─ y

    For cross-attention, whose query has an input of its own::

        q, text ─ MatMul wkv ─ [Add bkv] ─ Reshape (b,s,h,2,d) ─ MultiHeadAttention ─ y
    """
    editor, count = Editor(model.graph), 0
    for projections in find(model.graph, _match, "MultiHeadAttention", domain=MICROSOFT):
        _pack(editor, projections)
        count += 1
    remove_unused(model)
    return count


def _match(attention: ir.Node) -> _Projections | None:
    """Match an attention's projections; None if it is packed already."""
    if len(attention.inputs) < 3 or attention.inputs[2] is None:
        return None
    if any(value is not None for value in attention.inputs[3:5]):
        raise Declined("it has a bias or a padding mask")
    query, key, value = (_linear(item) for item in attention.inputs[:3])
    if key is None or value is None:
        raise Declined("key and value are no products with constant weights")
    if not _alike(key, value):
        raise Declined("key and value have different inputs or sizes")
    shared = query is not None and _alike(query, key)
    linears = [query, key, value] if query is not None and shared else [key, value]
    return _Projections(attention=attention, linears=linears)


def _alike(one: _Linear, other: _Linear) -> bool:
    """Return True if two layers have the same input and weights of one shape."""
    same = one.x is other.x and one.shape == other.shape
    return same and (one.bias is None) == (other.bias is None)


def _linear(value: ir.Value | None) -> _Linear | None:
    """Return the linear layer that computes a value, or None."""
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
    if not weight.is_initializer() or weight.is_graph_input() or len(weight.shape or ()) != 2:
        return None
    return _Linear(x=x, weight=weight, bias=bias)


def _pack(editor: Editor, match: _Projections) -> None:
    node, packed = match.attention, _product(editor, match)
    whole = len(match.linears) == 3
    inputs = [packed, None, None] if whole else [node.inputs[0], packed, None]
    for index, item in enumerate(inputs):
        node.replace_input_with(index, item)


def _product(editor: Editor, match: _Projections) -> ir.Value:
    """Insert one product, reshaped to (batch, tokens, heads, len(linears), channels)."""
    node, linears = match.attention, match.linears
    heads = node.attributes.get_int("num_heads", 1)
    rows, columns = linears[0].shape
    scope = f"{scope_of(node)}.to_{'qkv' if len(linears) == 3 else 'kv'}"
    count, x = len(linears), linears[0].x
    shape = [*(x.shape or ())][:2]

    def packed(*arrays: Array) -> Array:
        parts = [array.reshape(-1, heads, columns // heads) for array in arrays]
        return np.stack(parts, axis=2)

    weights = [linear.weight for linear in linears]
    tensor = lazy_tensor(packed, weights, (rows, count * columns))
    weight = editor.add_initializer(f"{scope}/weight", tensor)
    result = editor.add(
        "MatMul", [x, weight], before=node, scope=scope, shape=[*shape, count * columns]
    )
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases:
        tensor = lazy_tensor(packed, biases, (count * columns,))
        bias = editor.add_initializer(f"{scope}/bias", tensor)
        result = editor.add("Add", [result, bias], before=node, scope=scope, shape=result.shape)
    target = np.array([0, 0, heads, count, columns // heads], np.int64)
    return editor.add(
        "Reshape",
        [result, editor.add_initializer(f"{scope}/shape", target)],
        before=node,
        scope=scope,
        shape=[*shape, heads, count, columns // heads],
    )
