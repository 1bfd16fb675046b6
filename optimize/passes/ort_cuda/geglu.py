"""Fuse GEGLU, the gated GELU of a transformer's feed-forward, into com.microsoft's BiasSplitGelu.

Neither onnxscript nor onnx_ir has a rule. ``native/geglu.py`` fuses the same pattern on CPUs.
"""

import onnx_ir as ir

from latentforge.optimize.passes.dims import dim, dim_values
from latentforge.optimize.passes.matching import (
    MICROSOFT,
    Declined,
    find,
    is_channel_vector,
    producer_of,
    sole_consumer,
)
from latentforge.optimize.passes.rewriting import Editor, remove_unused

__all__ = ["HALVES", "fuse_geglu", "match_geglu"]

HALVES = frozenset({1280, 2560, 5120})
"""Output channels that ONNX Runtime's CUDA kernel is compiled for; with others it fails at run
time. They are four times the 320, 640 and 1280 channels of Stable Diffusion's blocks."""


def fuse_geglu(model: ir.Model) -> int:
    """Replace left * gelu(right), the halves of x + bias, with BiasSplitGelu(x, bias).

    ::

        x ─ Add ─ Split ─┬─ left ─────────── Mul ─ y
             │           └─ right ─ Gelu ─────┘      ->    x, bias ─ BiasSplitGelu ─ y
            bias
    """
    editor, count = Editor(model.graph), 0
    for summands, mul in find(model.graph, _match, "Gelu", domain=None):
        output = mul.outputs[0]
        fused = editor.add(
            "BiasSplitGelu", summands, before=mul, domain=MICROSOFT, shape=output.shape
        )
        editor.replace(output, fused)
        count += 1
    remove_unused(model)
    return count


def _match(gelu: ir.Node) -> tuple[tuple[ir.Value, ir.Value], ir.Node] | None:
    """Return x and bias, and the Mul whose output is replaced."""
    if (match := match_geglu(gelu)) is None:
        return None
    split, mul = match
    return _summands(split), mul


def match_geglu(gelu: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Return the Split and the Mul of left * gelu(right), the halves of the last axis.

    The Split's outputs may have other consumers; the Gelu's output has none.

    Returns:
        The two nodes, or None for a Gelu of something else than a Split's output.

    Raises:
        Declined: the Split and the Gelu do not make a GEGLU.
    """
    split, mul = producer_of(gelu.inputs[0], "Split"), sole_consumer(gelu.outputs[0])
    if split is None:
        return None
    if gelu.attributes.get_string("approximate", "none") != "none":
        raise Declined("the GELU is approximated by tanh")
    if mul is None or mul.op_type != "Mul":
        raise Declined("the GELU is not consumed by one Mul alone")
    _check_halves(split)
    left, right = split.outputs
    if gelu.inputs[0] is not right or left not in mul.inputs:
        raise Declined("it is not left * gelu(right)")
    return split, mul


def _check_halves(split: ir.Node) -> None:
    """Decline unless a Split cuts the last axis into halves of known size."""
    last = len(split.outputs[0].shape or ()) - 1
    if len(split.outputs) != 2 or split.attributes.get_int("axis", 0) not in (-1, last):
        raise Declined("the Split does not cut the last axis in two")
    half, other = (dim(value, -1) for value in split.outputs)
    sizes = dim_values(split.inputs[1]) if len(split.inputs) > 1 else [half, half]
    if not isinstance(half, int) or sizes != [half, half] or other != half:
        raise Declined("the Split does not cut halves of known size")


def _summands(split: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return x and the bias of the sum that a Split cuts, if the kernel takes its sizes."""
    half, added = dim(split.outputs[0], -1), producer_of(split.inputs[0], "Add")
    if half not in HALVES:
        widths = ", ".join(map(str, sorted(HALVES)))
        raise Declined(f"the kernel has no variant for {half} channels, only for {widths}")
    if len(split.outputs[0].shape or ()) != 3:
        raise Declined("the input is not of (batch, tokens, channels)")
    for x, bias in (added.inputs, added.inputs[::-1]) if added is not None else ():
        if x is not None and bias is not None and is_channel_vector(bias, 2 * int(half), 0):
            return x, bias
    raise Declined("the input is no sum with a constant bias, which the kernel requires")
