"""Attend with latentforge's own Attention (runtime/kernels), whose scores never leave the cache.

The operator, version 1, takes and returns float32: ``Attention(query, key, value)`` of shape
(batch, tokens, heads * size) is softmax(query key^T * scale) value for each of ``heads``.
``ort/attention.py`` matches the pattern; this pass replaces the result.
"""

import onnx_ir as ir

from latentforge.optimize.passes.dims import dim
from latentforge.optimize.passes.matching import MICROSOFT, Declined, find
from latentforge.optimize.passes.rewriting import Editor, remove_unused, replace_native

__all__ = ["native_attention"]


def native_attention(model: ir.Model) -> int:
    """Replace com.microsoft's MultiHeadAttention of query, key and value alone.

    ::

        q, k, v ─ MultiHeadAttention (num_heads, scale) ─ y
     ->
        q, k, v ─ latentforge.Attention (heads, scale) ─ y
    """
    editor, count = Editor(model.graph), 0
    for node in find(model.graph, _match, "MultiHeadAttention", domain=MICROSOFT):
        heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
        attributes = {"heads": heads, "scale": scale}
        replace_native(editor, node, "Attention", node.inputs[:3], attributes)
        count += 1
    remove_unused(model)
    return count


def _match(node: ir.Node) -> ir.Node:
    values = [value for value in node.inputs if value is not None]
    if len(values) != 3 or None in node.inputs[:3]:
        raise Declined("it has a mask or bias, or packed inputs")
    if any(output.uses() for output in node.outputs[1:]):
        raise Declined("its keys and values are used as outputs")
    if any(v.dtype != ir.DataType.FLOAT or len(v.shape or ()) != 3 for v in values):
        raise Declined("its inputs are not float32 of (batch, tokens, channels)")
    if len({dim(value, 2) for value in values}) != 1:
        raise Declined("the heads of its keys and values differ in size")
    if "scale" not in node.attributes:
        raise Declined("it has no explicit scale")
    if node.attributes.get_int("unidirectional", 0):
        raise Declined("it is causal")
    return node
