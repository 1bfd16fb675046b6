"""Attention."""

import onnx_ir as ir

from latentforge.optimize.passes.rewriting import (
    MICROSOFT,
    Editor,
    dim,
    remove_unused,
    replace_native,
)

__all__ = ["native_attention"]


def native_attention(model: ir.Model) -> int:
    """Replace."""
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if _is_attention(node):
            _attend(editor, node)
            count += 1
    remove_unused(model)
    return count


def _is_attention(node: ir.Node) -> bool:
    """Whether a node is a MultiHeadAttention with nothing but queries, keys and values."""
    if (node.domain, node.op_type) != (MICROSOFT, "MultiHeadAttention"):
        return False
    values = [value for value in node.inputs if value is not None]
    if len(values) != 3 or None in node.inputs[:3] or any(out.uses() for out in node.outputs[1:]):
        return False
    floats = all(v.dtype == ir.DataType.FLOAT and len(v.shape or ()) == 3 for v in values)
    # heads of keys and values may differ in size there, and not here
    widths = {dim(value, 2) for value in values} if floats else set()
    whole = len(widths) == 1 and "scale" in node.attributes
    return whole and not node.attributes.get_int("unidirectional", 0)


def _attend(editor: Editor, node: ir.Node) -> None:
    heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
    replace_native(editor, node, "Attention", node.inputs[:3], {"heads": heads, "scale": scale})
