"""Convolve and normalize by latentforge's own operators (runtime/kernels), with channels last.

``native_conv`` inserts Conv and GroupNorm of the domain ``latentforge`` where these can do the
work, each between two Transposes, which ``merge_transposes`` removes. ``fuse_conv`` then merges
into a Conv what stands next to it. No library has rules for operators of others.

The operators, version 1, take float32 of shape (batch, height, width, channels):

* ``Conv(x, weight, bias, scale, shift, row, residual, size)``, all but the first two optional: the
  input becomes act(x * scale + shift), is repeated ``upsample`` times in both directions, or
  enlarged by nearest neighbours to ``size``, the four sizes as int64, padded with zeros and
  convolved; row and residual are added. ``weight`` is (blocks of 16 output channels,
  input channels, height, width, 16), in float32 or float16, or in bfloat16 as
  ``half/bfloat16.py`` packs it; ``scale`` and ``shift`` are (batch, channels), ``row`` is
  (batch or 1, output channels). With ``silu``, act is SiLU.
* ``GroupScale(x, gamma, beta)``: scale and shift of a group normalization, (batch, channels).
* ``GroupNorm(x, gamma, beta)``: the normalization itself, followed by SiLU with ``silu``.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from latentforge.optimize.passes.matching import Declined, attempt, input_at
from latentforge.optimize.passes.ort_cuda.group_norm import (
    GroupNorm,
    match_group_norm,
    replace_in_nhwc,
)
from latentforge.optimize.passes.rewriting import (
    TO_NCHW,
    TO_NHWC,
    Array,
    Editor,
    lazy_tensor,
    remove_unused,
)
from latentforge.runtime.kernels import DOMAIN

__all__ = ["LANES", "native_conv", "pack"]

LANES = 16
"""Output channels that a kernel computes together."""


def native_conv(model: ir.Model) -> int:
    """Replace Conv and GroupNorm that the library has kernels for.

    ::

        x ─ Conv ─ y    ->    x ─ Transpose ─ latentforge.Conv ─ Transpose ─ y

        x ─ Reshape ─ InstanceNormalization ─ Reshape ─ Mul ─ Add ─ [SiLU] ─ y
     ->
        x ─ Transpose ─ latentforge.GroupNorm ─ Transpose ─ y
    """
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if node.op_type == "InstanceNormalization":
            if (norm := attempt(_match_norm, node)) is not None:
                replace_in_nhwc(editor, norm, DOMAIN, {"silu": int(norm.swish)})
                count += 1
        elif node.op_type == "Conv" and not node.domain:
            if attempt(_check_conv, node) is not None:
                _convert(editor, node)
                count += 1
    remove_unused(model)
    return count


def _match_norm(node: ir.Node) -> GroupNorm:
    norm = match_group_norm(node)
    if norm.x.dtype != ir.DataType.FLOAT:
        raise Declined(f"it is in {norm.x.dtype}, not in float32")
    return norm


def _check_conv(node: ir.Node) -> bool:
    """Return True for a dense Conv of images by 1x1 or 3x3, with stride 1 or 2.

    Raises:
        Declined: the library has no kernel for the Conv.
    """
    x, weight = node.inputs[0], node.inputs[1]
    if not _constant_floats(node.inputs[1:]):
        raise Declined("weight and bias are no float32 constants")
    if x is None or x.dtype != ir.DataType.FLOAT or weight is None or weight.shape is None:
        raise Declined("its input is not in float32")
    if (kernel := tuple(weight.shape.numpy()[2:])) not in ((1, 1), (3, 3)):
        raise Declined(f"its kernel is {kernel}, not 1x1 or 3x3")
    if (strides := _ints(node, "strides", 1)) not in ((1, 1), (2, 2)):
        raise Declined(f"its strides are {strides}, not 1 or 2 in both directions")
    if not 0 <= min(pads := _ints(node, "pads", 0, 4)) <= max(pads) < kernel[0]:
        raise Declined(f"its pads are {pads}, not 0 to {kernel[0] - 1}")
    if _ints(node, "dilations", 1) != (1, 1) or node.attributes.get_int("group", 1) != 1:
        raise Declined("it is dilated or grouped")
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise Declined("its padding is automatic")
    return True


def _constant_floats(values: Sequence[ir.Value | None]) -> bool:
    return all(
        value is None
        or (value.is_initializer() and not value.is_graph_input())
        and value.dtype == ir.DataType.FLOAT
        for value in values
    )


def _ints(node: ir.Node, name: str, default: int, count: int = 2) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints(name, (default,) * count))


def _convert(editor: Editor, node: ir.Node) -> None:
    x, weight, bias = node.inputs[0], node.inputs[1], input_at(node, 2)
    assert x is not None and weight is not None and weight.shape is not None
    channels, *rest = weight.shape.numpy()
    shape = [-(-channels // LANES), *rest, LANES]
    packed = editor.add_initializer(f"{weight.name}/packed", lazy_tensor(pack, [weight], shape))
    rows = editor.add_transpose(x, TO_NHWC, before=node)
    output = node.outputs[0]
    result = editor.add(
        "Conv",
        [rows, packed, bias],
        before=node,
        domain=DOMAIN,
        shape=None if output.shape is None else [output.shape[axis] for axis in TO_NHWC],
        attributes={
            "channels": channels,
            "pads": list(_ints(node, "pads", 0, 4)),
            "silu": 0,
            "stride": _ints(node, "strides", 1)[0],
            "upsample": 1,
        },
    )
    conv = result.producer()
    assert conv is not None
    node.name, conv.name = conv.name, node.name
    editor.replace(output, editor.add_transpose(result, TO_NCHW, before=node))


def pack(weight: Array) -> Array:
    """Return weights (out, in, height, width) as (blocks, in, height, width, 16) for the kernels.

    Output channel k is lane k % 16 of block k // 16; lanes without a channel are zero.
    """
    missing = -len(weight) % LANES
    whole = np.pad(weight, [(0, missing), (0, 0), (0, 0), (0, 0)])
    blocks = whole.reshape(-1, LANES, *weight.shape[1:])
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 4, 1))
