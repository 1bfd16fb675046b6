"""Fuse x * sigmoid(alpha x) into com.microsoft's QuickGelu.

SiLU is alpha 1, CLIP's activation alpha 1.702. onnxscript ships no rule for it.
ONNX Runtime makes the same node when it loads a graph, so that on a CPU this changes no time.
"""

import onnx_ir as ir

from latentforge.optimize.passes.rewriting import (
    MICROSOFT,
    Editor,
    producer_of,
    remove_unused,
    sole_consumer,
    split_scalar,
)

__all__ = ["fuse_quick_gelu"]


def fuse_quick_gelu(model: ir.Model) -> int:
    """Replace x * sigmoid(alpha * x) with QuickGelu(x)."""
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if node.op_type != "Mul" or node.domain or (found := _match(node)) is None:
            continue
        x, alpha = found
        fused = editor.add(
            "QuickGelu",
            [x],
            before=node,
            domain=MICROSOFT,
            shape=x.shape,
            attributes={"alpha": alpha},
        )
        editor.replace(node.outputs[0], fused)
        count += 1
    remove_unused(model)
    return count


def _match(node: ir.Node) -> tuple[ir.Value, float] | None:
    for x, gate in (node.inputs, node.inputs[::-1]):
        sigmoid = producer_of(gate, "Sigmoid")
        if x is None or sigmoid is None or sole_consumer(sigmoid.outputs[0]) is None:
            continue
        inner = sigmoid.inputs[0]
        if inner is x:
            return x, 1.0
        scaled = producer_of(inner, "Mul", "Div")
        parts = split_scalar(scaled) if scaled is not None else None
        if parts is not None and parts[0] is x:
            return parts
    return None
