"""Multiply tokens by weights, and attend, with latentforge's own operators of runtime/kernels.

``native_product`` makes MatMul and Attention of the domain ``latentforge`` of those that they can
do. Against ONNX Runtime's own this saves no arithmetic: weights are read from the file as they lie
there, in float16 too, so that loading neither copies nor converts them; what is added is added
where the product is written, and so is a feed-forward's gate applied; and scores never leave the
cache. No library has rules for operators that are not its own.

The operators, version 1, take and give float32:

* ``MatMul(x, weight, bias, residual)``, of which the last two may be missing: x of shape
  (..., inputs) times a weight packed like that of a 1 x 1 ``Conv``, plus bias (outputs) and a
  residual of the result's shape. With ``gated`` it gives left * gelu(right), the halves of that:
  weight and bias have 16 outputs of left, then those of right that they meet, and so on, and there
  is no residual.
* ``Attention(query, key, value)`` of shape (batch, tokens, heads * size):
  softmax(query key^T * scale) value for each of ``heads``.
"""

import onnx_ir as ir

from latentforge.optimize.passes.native.conv import LANES, pack
from latentforge.optimize.passes.rewriting import (
    Array,
    Editor,
    absorb_add,
    dim,
    input_at,
    is_channel_vector,
    lazy_tensor,
    remove_unused,
    replace_native,
)

__all__ = ["BIAS", "RESIDUAL", "WEIGHT", "native_product"]

WEIGHT, BIAS, RESIDUAL = 1, 2, 3


def native_product(model: ir.Model) -> int:
    """Replace products with a constant weight, what is added to them or gates them, and plain
    attention.
    """
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if _is_product(node):
            _convert(editor, node)
            count += 1
        elif node.op_type == "Add" and not node.domain:
            count += absorb_add(editor, node, "MatMul", _place)
    remove_unused(model)
    return count


def _is_product(node: ir.Node) -> bool:
    """Whether a node is a MatMul of float tokens with a constant matrix."""
    if node.op_type != "MatMul" or node.domain:
        return False
    x, weight = node.inputs
    if x is None or weight is None or not weight.is_initializer() or weight.is_graph_input():
        return False
    floats = x.dtype == weight.dtype == ir.DataType.FLOAT
    return floats and len(weight.shape or ()) == 2 and len(x.shape or ()) >= 2


def _convert(editor: Editor, node: ir.Node) -> None:
    x, weight = node.inputs
    assert x is not None and weight is not None and weight.shape is not None
    inputs, channels = weight.shape.numpy()
    shape = [-(-channels // LANES), inputs, 1, 1, LANES]
    packed = editor.add_initializer(f"{weight.name}/packed", lazy_tensor(_pack, [weight], shape))
    replace_native(editor, node, "MatMul", [x, packed], {"channels": channels})


def _pack(weight: Array) -> Array:
    return pack(weight.T[:, :, None, None])


def _place(product: ir.Node, added: ir.Value) -> tuple[int, ir.Value] | None:
    """A bias, or a tensor like the result, is the input of that name, if it is free."""
    if product.attributes.get_int("gated", 0):
        return None
    output, channels = product.outputs[0], product.attributes["channels"].as_int()
    if (
        is_channel_vector(added, channels, 0)
        and len(added.shape or ()) == 1
        and added.is_initializer()
    ):
        return (BIAS, added) if input_at(product, BIAS) is None else None
    whole = added.shape is not None and output.shape is not None
    whole = whole and len(added.shape or ()) == len(output.shape or ()) > 1
    alike = whole and all(
        dim(added, axis) == dim(output, axis) for axis in range(len(output.shape or ()))
    )
    return (RESIDUAL, added) if alike and input_at(product, RESIDUAL) is None else None
