"""Gate a feed-forward in latentforge's own MatMul (runtime/kernels).

``ort_cuda/geglu.py`` has the matcher, which both share; ``native/product.py`` defines the
operator.
"""

from functools import partial

import onnx_ir as ir

from latentforge.optimize.passes.matching import (
    Declined,
    find,
    input_at,
    is_native,
    sole_consumer,
)
from latentforge.optimize.passes.native.conv import LANES
from latentforge.optimize.passes.native.product import BIAS, RESIDUAL, WEIGHT
from latentforge.optimize.passes.ort_cuda.geglu import match_geglu
from latentforge.optimize.passes.rewriting import Array, Editor, lazy_tensor, remove_unused

__all__ = ["native_geglu"]


def native_geglu(model: ir.Model) -> int:
    """Let a latentforge MatMul multiply the left half of its output by the GELU of the right.

    ::

        x ─ MatMul (weight, [bias]) ─ Split ─┬─ left ─────────── Mul ─ y
                                             └─ right ─ Gelu ─────┘
     ->
        x ─ MatMul (weight', [bias'], gated) ─ y
    """
    editor, count = Editor(model.graph), 0
    for product, split, mul in find(model.graph, _match, "Gelu", domain=None):
        _gate(editor, product)
        product.outputs[0].shape = split.outputs[0].shape
        editor.replace(mul.outputs[0], product.outputs[0])
        count += 1
    remove_unused(model)
    return count


def _match(gelu: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """Return the product, the Split and the Mul of a GEGLU; None for another Gelu."""
    if (match := match_geglu(gelu)) is None:
        return None
    split, mul = match
    whole = split.inputs[0]
    product = whole.producer() if whole is not None else None
    if whole is None or product is None or not is_native(product, "MatMul"):
        raise Declined("the Split is not of a latentforge MatMul's output")
    if any(sole_consumer(value) is None for value in (whole, *split.outputs)):
        raise Declined("the product or one of its halves has another consumer")
    if (channels := product.attributes["channels"].as_int()) % (2 * LANES):
        raise Declined(f"{channels} channels are not two halves of whole blocks of {LANES}")
    if input_at(product, RESIDUAL) is not None:
        raise Declined("the product adds a residual")
    return product, split, mul


def _gate(editor: Editor, product: ir.Node) -> None:
    pairs = product.attributes["channels"].as_int() // (2 * LANES)
    for index in (WEIGHT, BIAS):
        if (value := input_at(product, index)) is not None:
            product.replace_input_with(index, _interleaved(editor, value, pairs))
    product.attributes.add(ir.AttrInt64("gated", 1))


def _interleaved(editor: Editor, value: ir.Value, pairs: int) -> ir.Value:
    """Return a packed weight or a bias with blocks of left and of right in turn."""
    assert value.shape is not None
    tensor = lazy_tensor(partial(_interleave, pairs), [value], value.shape.numpy())
    return editor.add_initializer(f"{value.name}/gated", tensor)


def _interleave(pairs: int, array: Array) -> Array:
    return array.reshape(2, pairs, -1).swapaxes(0, 1)
