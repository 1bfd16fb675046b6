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

from collections.abc import Sequence
from functools import partial

import onnx_ir as ir

from latentforge.optimize.passes.native.convolution import LANES, pack
from latentforge.optimize.passes.ort_cuda.geglu import match_geglu
from latentforge.optimize.passes.rewriting import (
    MICROSOFT,
    Array,
    Editor,
    given,
    is_native,
    lazily,
    only_user,
    size,
    sweep,
    take_sum,
    vector,
)
from latentforge.runtime.kernels import DOMAIN

__all__ = ["native_product"]

_WEIGHT, _BIAS, _RESIDUAL = 1, 2, 3


def native_product(model: ir.Model) -> int:
    """Replace products with a constant weight, what is added to them or gates them, and plain
    attention.
    """
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if _is_product(node):
            _convert(editor, node)
            count += 1
        elif _is_attention(node):
            _attend(editor, node)
            count += 1
        elif node.op_type == "Add" and not node.domain:
            count += take_sum(editor, node, "MatMul", _place)
        elif node.op_type == "Gelu":
            count += _take_gate(editor, node)
    sweep(model)
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
    packed = editor.initializer(f"{weight.name}/packed", lazily(_pack, [weight], shape))
    _replace(editor, node, "MatMul", [x, packed], {"channels": channels})


def _pack(weight: Array) -> Array:
    return pack(weight.T[:, :, None, None])


def _is_attention(node: ir.Node) -> bool:
    """Whether a node is a MultiHeadAttention with nothing but queries, keys and values."""
    if (node.domain, node.op_type) != (MICROSOFT, "MultiHeadAttention"):
        return False
    values = [value for value in node.inputs if value is not None]
    if len(values) != 3 or None in node.inputs[:3] or any(out.uses() for out in node.outputs[1:]):
        return False
    floats = all(v.dtype == ir.DataType.FLOAT and len(v.shape or ()) == 3 for v in values)
    # heads of keys and values may differ in size there, and not here
    widths = {size(value, 2) for value in values} if floats else set()
    whole = len(widths) == 1 and "scale" in node.attributes
    return whole and not node.attributes.get_int("unidirectional", 0)


def _attend(editor: Editor, node: ir.Node) -> None:
    heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
    _replace(editor, node, "Attention", node.inputs[:3], {"heads": heads, "scale": scale})


def _replace(
    editor: Editor,
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int | float],
) -> None:
    output = node.outputs[0]
    result = editor.add(
        op_type, inputs, before=node, domain=DOMAIN, shape=output.shape, attributes=attributes
    )
    made = result.producer()
    assert made is not None
    node.name, made.name = made.name, node.name
    editor.replace(output, result)


def _place(product: ir.Node, added: ir.Value) -> tuple[int, ir.Value] | None:
    """A bias, or a tensor like the result, is the input of that name, if it is free."""
    if product.attributes.get_int("gated", 0):
        return None
    output, channels = product.outputs[0], product.attributes["channels"].as_int()
    if vector(added, channels, 0) and len(added.shape or ()) == 1 and added.is_initializer():
        return (_BIAS, added) if given(product, _BIAS) is None else None
    whole = added.shape is not None and output.shape is not None
    whole = whole and len(added.shape or ()) == len(output.shape or ()) > 1
    alike = whole and all(
        size(added, axis) == size(output, axis) for axis in range(len(output.shape or ()))
    )
    return (_RESIDUAL, added) if alike and given(product, _RESIDUAL) is None else None


def _take_gate(editor: Editor, gelu: ir.Node) -> bool:
    """Let a product of ours multiply the left half of what it gives by the GELU of the right."""
    found = match_geglu(gelu)
    product = _halved(found[0]) if found is not None else None
    if found is None or product is None:
        return False
    split, mul = found
    pairs = product.attributes["channels"].as_int() // (2 * LANES)
    for index in (_WEIGHT, _BIAS):
        if (value := given(product, index)) is not None:
            product.replace_input_with(index, _in_turn(editor, value, pairs))
    product.attributes.add(ir.AttrInt64("gated", 1))
    product.outputs[0].shape = split.outputs[0].shape
    editor.replace(mul.outputs[0], product.outputs[0])
    return True


def _halved(split: ir.Node) -> ir.Node | None:
    """The product of ours that a Split cuts, in whole blocks, if nobody else uses it or a half."""
    whole = split.inputs[0]
    product = whole.producer() if whole is not None else None
    if whole is None or product is None or not is_native(product, "MatMul"):
        return None
    alone = all(only_user(value) is not None for value in (whole, *split.outputs))
    blocks = product.attributes["channels"].as_int() % (2 * LANES) == 0
    return product if alone and blocks and given(product, _RESIDUAL) is None else None


def _in_turn(editor: Editor, value: ir.Value, pairs: int) -> ir.Value:
    """A packed weight or a bias with its blocks of left and of right in turn."""
    assert value.shape is not None
    mixed = lazily(partial(_mix, pairs), [value], value.shape.numpy())
    return editor.initializer(f"{value.name}/gated", mixed)


def _mix(pairs: int, array: Array) -> Array:
    return array.reshape(2, pairs, -1).swapaxes(0, 1)
