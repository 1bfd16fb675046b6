"""Convolve with channels last, by com.microsoft's NhwcConv.

Tensor cores want channels last. Neither onnxscript nor onnx_ir has rules for it. ONNX Runtime's
own script inserts NhwcConv too, and leaves two Transposes around each; here ``merge_transposes``
removes them.
"""

import onnx_ir as ir

from latentforge.optimize.passes.matching import MICROSOFT, Declined, find
from latentforge.optimize.passes.rewriting import (
    TO_NCHW,
    TO_NHWC,
    Array,
    Editor,
    lazy_tensor,
    remove_unused,
)

__all__ = ["nhwc_conv"]


def nhwc_conv(model: ir.Model) -> int:
    """Replace each Conv over images with Transpose, NhwcConv and Transpose.

    ::

        x ─ Conv (weight, bias) ─ y  ->  x ─ Transpose ─ NhwcConv (weight', bias) ─ Transpose ─ y
    """
    editor, count = Editor(model.graph), 0
    for conv in find(model.graph, _match, "Conv"):
        _convert(editor, conv)
        count += 1
    remove_unused(model)
    return count


def _match(conv: ir.Node) -> ir.Node:
    weight = conv.inputs[1]
    if weight is None or not weight.is_initializer() or weight.is_graph_input():
        raise Declined("the weight is no constant")
    if conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise Declined("its padding is automatic")
    if len(weight.shape or ()) != 4:
        raise Declined("it is not over images (two axes)")
    return conv


def _convert(editor: Editor, node: ir.Node) -> None:
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None and weight.shape is not None
    shape = [weight.shape.numpy()[axis] for axis in TO_NHWC]
    rows = editor.add_initializer(f"{weight.name}/nhwc", lazy_tensor(_to_nhwc, [weight], shape))
    output = node.outputs[0]
    result = editor.add(
        "NhwcConv",
        [editor.add_transpose(x, TO_NHWC, before=node), rows, *node.inputs[2:]],
        before=node,
        domain=MICROSOFT,
        shape=None if output.shape is None else [output.shape[axis] for axis in TO_NHWC],
        attributes={name: attribute.value for name, attribute in node.attributes.items()},
    )
    editor.replace(output, editor.add_transpose(result, TO_NCHW, before=node))


def _to_nhwc(weight: Array) -> Array:
    return weight.transpose(TO_NHWC)
