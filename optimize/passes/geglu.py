"""Fuse the gated GELU of a transformer's feed-forward into com.microsoft's BiasSplitGelu.

Neither onnxscript nor onnx_ir ships a rule.
"""

import onnx_ir as ir

from latentforge.optimize.passes.rewriting import (
    MICROSOFT,
    Editor,
    made_by,
    only_user,
    size,
    sizes,
    sweep,
    vector,
)

__all__ = ["HALVES", "fuse_geglu"]

HALVES = frozenset({1280, 2560, 5120})
"""Output channels that ONNX Runtime's CUDA kernel is compiled for; it refuses others when it runs.

They are four times the 320, 640 and 1280 channels of Stable Diffusion's blocks.
"""


def fuse_geglu(model: ir.Model) -> int:
    """Replace left * gelu(right), the halves of x + bias, with BiasSplitGelu(x, bias)."""
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if node.op_type != "Gelu" or (found := _match(node)) is None:
            continue
        x, bias, mul = found
        output = mul.outputs[0]
        fused = editor.add(
            "BiasSplitGelu", [x, bias], before=mul, domain=MICROSOFT, shape=output.shape
        )
        editor.replace(output, fused)
        count += 1
    sweep(model)
    return count


def _match(gelu: ir.Node) -> tuple[ir.Value, ir.Value, ir.Node] | None:
    split, mul = made_by(gelu.inputs[0], "Split"), only_user(gelu.outputs[0])
    exact = gelu.attributes.get_string("approximate", "none") == "none"
    if split is None or mul is None or mul.op_type != "Mul" or not exact or not _halves(split):
        return None
    left, right = split.outputs
    if gelu.inputs[0] is not right or left not in mul.inputs:
        return None
    added = made_by(split.inputs[0], "Add")
    for x, bias in (added.inputs, added.inputs[::-1]) if added is not None else ():
        if x is not None and bias is not None and vector(bias, 2 * int(_last(left)), 0):
            return x, bias, mul
    return None


def _last(value: ir.Value) -> int:
    last = size(value, -1) if value.shape is not None and len(value.shape) == 3 else 0
    return last if isinstance(last, int) else 0


def _halves(split: ir.Node) -> bool:
    """Whether a Split cuts the last of three axes into halves that the kernel takes."""
    if len(split.outputs) != 2 or split.attributes.get_int("axis", 0) not in (-1, 2):
        return False
    half = _last(split.outputs[0])
    given = sizes(split.inputs[1]) if len(split.inputs) > 1 else [half, half]
    return half in HALVES and given == [half, half] and _last(split.outputs[1]) == half
