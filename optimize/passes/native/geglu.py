"""GEGLU."""

from functools import partial

import onnx_ir as ir

from latentforge.optimize.passes.native.conv import LANES
from latentforge.optimize.passes.native.product import BIAS, RESIDUAL, WEIGHT
from latentforge.optimize.passes.ort_cuda.geglu import match_geglu
from latentforge.optimize.passes.rewriting import (
    Array,
    Editor,
    input_at,
    is_native,
    lazy_tensor,
    remove_unused,
    sole_consumer,
)

__all__ = ["native_geglu"]


def native_geglu(model: ir.Model) -> int:
    """Replace."""
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if node.op_type == "Gelu":
            count += _take_gate(editor, node)
    remove_unused(model)
    return count


def _take_gate(editor: Editor, gelu: ir.Node) -> bool:
    """Let a product of ours multiply the left half of what it gives by the GELU of the right."""
    found = match_geglu(gelu)
    product = _halved(found[0]) if found is not None else None
    if found is None or product is None:
        return False
    split, mul = found
    pairs = product.attributes["channels"].as_int() // (2 * LANES)
    for index in (WEIGHT, BIAS):
        if (value := input_at(product, index)) is not None:
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
    alone = all(sole_consumer(value) is not None for value in (whole, *split.outputs))
    blocks = product.attributes["channels"].as_int() % (2 * LANES) == 0
    return product if alone and blocks and input_at(product, RESIDUAL) is None else None


def _in_turn(editor: Editor, value: ir.Value, pairs: int) -> ir.Value:
    """A packed weight or a bias with its blocks of left and of right in turn."""
    assert value.shape is not None
    mixed = lazy_tensor(partial(_mix, pairs), [value], value.shape.numpy())
    return editor.add_initializer(f"{value.name}/gated", mixed)


def _mix(pairs: int, array: Array) -> Array:
    return array.reshape(2, pairs, -1).swapaxes(0, 1)
