"""Fuse the gated GELU of a transformer's feed-forward into com.microsoft's BiasSplitGelu.

Neither onnxscript nor onnx_ir ships a rule.
"""

import onnx_ir as ir

from latentforge.optimize.passes.rewriting import (
    MICROSOFT,
    Editor,
    dim,
    dim_values,
    is_channel_vector,
    producer_of,
    remove_unused,
    sole_consumer,
)

__all__ = ["HALVES", "fuse_geglu", "match_geglu"]

HALVES = frozenset({1280, 2560, 5120})
"""Output channels that ONNX Runtime's CUDA kernel is compiled for; it refuses others when it runs.

They are four times the 320, 640 and 1280 channels of Stable Diffusion's blocks.
"""


def fuse_geglu(model: ir.Model) -> int:
    """Replace left * gelu(right), the halves of x + bias, with BiasSplitGelu(x, bias)."""
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if (found := match_geglu(node)) is None or (summands := _summands(found[0])) is None:
            continue
        _, mul = found
        output = mul.outputs[0]
        fused = editor.add(
            "BiasSplitGelu", summands, before=mul, domain=MICROSOFT, shape=output.shape
        )
        editor.replace(output, fused)
        count += 1
    remove_unused(model)
    return count


def match_geglu(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The Split and the Mul of left * gelu(right), halves of the last axis, if a node is its Gelu.

    The Split's outputs may have other users; the Gelu's has none.
    """
    if node.op_type != "Gelu" or node.attributes.get_string("approximate", "none") != "none":
        return None
    split, mul = producer_of(node.inputs[0], "Split"), sole_consumer(node.outputs[0])
    if split is None or mul is None or mul.op_type != "Mul" or not _halves(split):
        return None
    left, right = split.outputs
    return (split, mul) if node.inputs[0] is right and left in mul.inputs else None


def _halves(split: ir.Node) -> bool:
    """Whether a Split cuts the last axis into halves of known size."""
    last = len(split.outputs[0].shape or ()) - 1
    if len(split.outputs) != 2 or split.attributes.get_int("axis", 0) not in (-1, last):
        return False
    half, other = (dim(value, -1) for value in split.outputs)
    given = dim_values(split.inputs[1]) if len(split.inputs) > 1 else [half, half]
    return isinstance(half, int) and given == [half, half] and other == half


def _summands(split: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """x and the bias of their sum, if a Split cuts it and the kernel takes its sizes."""
    half, added = dim(split.outputs[0], -1), producer_of(split.inputs[0], "Add")
    if half not in HALVES or len(split.outputs[0].shape or ()) != 3:
        return None
    for x, bias in (added.inputs, added.inputs[::-1]) if added is not None else ():
        if x is not None and bias is not None and is_channel_vector(bias, 2 * int(half), 0):
            return x, bias
    return None
