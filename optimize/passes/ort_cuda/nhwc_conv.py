"""Convolve with channels last, com.microsoft's NhwcConv, and keep tensors in that layout.

Tensor cores want channels last. Neither onnxscript nor onnx_ir ships rules; ONNX Runtime's own
script makes NhwcConv too, and leaves two transposes around each.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.passes.rewriting import (
    MICROSOFT,
    TO_NCHW,
    TO_NHWC,
    Editor,
    lazy_tensor,
    remove_unused,
)

__all__ = ["nhwc_conv"]


def nhwc_conv(model: ir.Model) -> int:
    """Replace each Conv over images by Transpose, NhwcConv and Transpose."""
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if node.op_type == "Conv" and not node.domain and _convertible(node):
            _convert(editor, node)
            count += 1
    remove_unused(model)
    return count


def _convertible(node: ir.Node) -> bool:
    weight = node.inputs[1]
    fixed = weight is not None and weight.is_initializer() and not weight.is_graph_input()
    plain = node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    return fixed and plain and weight is not None and len(weight.shape or ()) == 4


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


def _to_nhwc(weight: NDArray[np.generic]) -> NDArray[np.generic]:
    return weight.transpose(TO_NHWC)
