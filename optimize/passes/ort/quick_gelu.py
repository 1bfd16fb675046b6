"""Fuse x * sigmoid(alpha x) into com.microsoft's QuickGelu.

SiLU is alpha = 1, CLIP's activation alpha = 1.702. onnxscript has no rule for it. ONNX Runtime
makes the same node when it loads a graph, so on a CPU the pass changes no time; other passes
match QuickGelu.
"""

import onnx_ir as ir

from latentforge.optimize.passes.matching import (
    MICROSOFT,
    Declined,
    find,
    producer_of,
    sole_consumer,
    split_scalar,
)
from latentforge.optimize.passes.rewriting import Editor, remove_unused

__all__ = ["fuse_quick_gelu"]


def fuse_quick_gelu(model: ir.Model) -> int:
    """Replace x * sigmoid(alpha * x) with QuickGelu(x).

    ::

        x ─┬───────────────────────────┐
           └─ [Mul alpha] ─ Sigmoid ─ Mul ─ y    ->    x ─ QuickGelu (alpha) ─ y
    """
    editor, count = Editor(model.graph), 0
    for x, alpha, mul in find(model.graph, _match, "Mul"):
        fused = editor.add(
            "QuickGelu",
            [x],
            before=mul,
            domain=MICROSOFT,
            shape=x.shape,
            attributes={"alpha": alpha},
        )
        editor.replace(mul.outputs[0], fused)
        count += 1
    remove_unused(model)
    return count


def _match(mul: ir.Node) -> tuple[ir.Value, float, ir.Node] | None:
    """Return x, alpha and the node, if the node multiplies x by its gate."""
    reason = None
    for x, gate in (mul.inputs, mul.inputs[::-1]):
        sigmoid = producer_of(gate, "Sigmoid")
        if x is None or sigmoid is None:
            continue
        if sole_consumer(sigmoid.outputs[0]) is None:
            reason = "the Sigmoid has several consumers"
        elif (alpha := _alpha(sigmoid.inputs[0], x)) is not None:
            return x, alpha, mul
        else:
            reason = "the Sigmoid is not of the other factor, or of its product with a number"
    if reason is not None:
        raise Declined(reason)
    return None


def _alpha(gate: ir.Value | None, x: ir.Value) -> float | None:
    """Return alpha if a value is alpha * x, else None."""
    if gate is x:
        return 1.0
    scaled = producer_of(gate, "Mul", "Div")
    parts = split_scalar(scaled) if scaled is not None else None
    return parts[1] if parts is not None and parts[0] is x else None
