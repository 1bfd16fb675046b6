"""Multiply tokens by constant weights with latentforge's own MatMul (runtime/kernels).

Against ONNX Runtime's own this saves no arithmetic. But weights are used as they lie in the file,
in float16 too, so that loading neither copies nor converts them; and bias and residual are added
(and the gate of a feed-forward applied, see ``native/geglu.py``) where the product is written. No
library has rules for operators of others.

The operator, version 1, takes and returns float32:

``MatMul(x, weight, bias, residual)``, the last two optional: x of shape (..., inputs) times a
weight packed like that of a 1x1 ``Conv``, plus bias (outputs) and a residual of the result's
shape. With ``gated`` it returns left * gelu(right), where left and right are the halves of that
sum: weight and bias have 16 outputs of left, then the 16 outputs of right that these are multiplied
by, and so on, and there is no residual.
"""

import onnx_ir as ir

from latentforge.optimize.passes.dims import dim
from latentforge.optimize.passes.matching import (
    Declined,
    attempt,
    input_at,
    is_channel_vector,
)
from latentforge.optimize.passes.native.conv import LANES, pack
from latentforge.optimize.passes.rewriting import (
    Array,
    Editor,
    absorb_add,
    lazy_tensor,
    remove_unused,
    replace_native,
)

__all__ = ["BIAS", "RESIDUAL", "WEIGHT", "native_product"]

WEIGHT, BIAS, RESIDUAL = 1, 2, 3
"""Inputs of MatMul."""


def native_product(model: ir.Model) -> int:
    """Replace products of float32 tokens with constant weights, and what is added to them.

    ::

        x ─ MatMul weight ─ [Add bias] ─ [Add residual] ─ y
     ->
        x, weight', [bias], [residual] ─ latentforge.MatMul ─ y

    Returns:
        The number of nodes replaced.
    """
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if node.op_type == "MatMul" and not node.domain:
            if attempt(_check_product, node) is not None:
                _convert(editor, node)
                count += 1
        elif node.op_type == "Add" and not node.domain:
            count += absorb_add(editor, node, "MatMul", _summand_input)
    remove_unused(model)
    return count


def _check_product(node: ir.Node) -> bool:
    """Return True for a MatMul of float32 tokens with a constant matrix.

    Raises:
        Declined: it is another MatMul.
    """
    x, weight = node.inputs
    if x is None or weight is None or not weight.is_initializer() or weight.is_graph_input():
        raise Declined("its weight is no constant")
    if not x.dtype == weight.dtype == ir.DataType.FLOAT:
        raise Declined("input and weight are not in float32")
    if len(weight.shape or ()) != 2 or len(x.shape or ()) < 2:
        raise Declined("it is not a product of tokens with a matrix")
    return True


def _convert(editor: Editor, node: ir.Node) -> None:
    x, weight = node.inputs
    assert x is not None and weight is not None and weight.shape is not None
    inputs, channels = weight.shape.numpy()
    shape = [-(-channels // LANES), inputs, 1, 1, LANES]
    packed = editor.add_initializer(f"{weight.name}/packed", lazy_tensor(_pack, [weight], shape))
    replace_native(editor, node, "MatMul", [x, packed], {"channels": channels})


def _pack(weight: Array) -> Array:
    return pack(weight.T[:, :, None, None])


def _summand_input(product: ir.Node, summand: ir.Value) -> tuple[int, ir.Value] | None:
    """Return the free input of a product that adds a summand to its output, and the summand."""
    if product.attributes.get_int("gated", 0):
        return None
    output, channels = product.outputs[0], product.attributes["channels"].as_int()
    is_row = len(summand.shape or ()) == 1 and summand.is_initializer()
    if is_row and is_channel_vector(summand, channels, 0):
        return (BIAS, summand) if input_at(product, BIAS) is None else None
    whole = summand.shape is not None and output.shape is not None
    whole = whole and len(summand.shape or ()) == len(output.shape or ()) > 1
    alike = whole and all(
        dim(summand, axis) == dim(output, axis) for axis in range(len(output.shape or ()))
    )
    return (RESIDUAL, summand) if alike and input_at(product, RESIDUAL) is None else None
