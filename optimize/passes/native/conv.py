"""Convolve by latentforge's own operators, which runtime/kernels has, with channels last.

``native_conv`` makes Conv and GroupNorm of the domain ``latentforge`` of those that they can do,
each between two transposes, which ``merge_transposes`` takes away. ``fuse_conv`` then lets a Conv
do what stands around it: a group normalization with its activation and nearest upsampling while it
reads its input; the time embedding and the residual while it writes its output. No library has
rules for operators that are not its own.

The operators, version 1, take float32 of shape (batch, height, width, channels):

* ``Conv(x, weight, bias, scale, shift, row, residual)``, of which all but two may be missing: the
  input becomes act(x * scale + shift), is repeated ``upsample`` times each way, padded with zeros
  and convolved; row and residual are added. ``weight`` is (blocks of 16 output channels, input
  channels, height, width, 16), in float32 or float16; ``scale`` and ``shift`` are (batch,
  channels), ``row`` is (batch or 1, output channels). ``silu`` says that act is SiLU.
* ``GroupScale(x, gamma, beta)``: scale and shift of a group normalization, (batch, channels).
* ``GroupNorm(x, gamma, beta)``: the normalization itself, followed by SiLU if ``silu`` says so.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.passes.ort_cuda.group_norm import match_group_norm, replace_in_nhwc
from latentforge.optimize.passes.rewriting import (
    TO_NCHW,
    TO_NHWC,
    Editor,
    input_at,
    lazy_tensor,
    remove_unused,
)
from latentforge.runtime.kernels import DOMAIN

__all__ = ["LANES", "native_conv", "pack"]

LANES = 16
"""Output channels that a kernel computes at once."""


def native_conv(model: ir.Model) -> int:
    """Replace each Conv and GroupNorm that ours can do by Transpose, ours and Transpose."""
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if (found := match_group_norm(node)) is not None and found.x.dtype == ir.DataType.FLOAT:
            replace_in_nhwc(editor, found, DOMAIN, {"silu": int(found.swish)})
            count += 1
        elif _convertible(node):
            _convert(editor, node)
            count += 1
    remove_unused(model)
    return count


def _convertible(node: ir.Node) -> bool:
    """Whether a node is a Conv of whole images by 1x1 or 3x3, dense, in steps of 1 or 2."""
    if node.op_type != "Conv" or node.domain or not _constant_floats(node.inputs[1:]):
        return False
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or x.dtype != ir.DataType.FLOAT or weight is None or weight.shape is None:
        return False
    kernel, strides = tuple(weight.shape.numpy()[2:]), _ints(node, "strides", 1)
    return (
        kernel in ((1, 1), (3, 3))
        and strides in ((1, 1), (2, 2))
        and _ints(node, "dilations", 1) == (1, 1)
        and node.attributes.get_int("group", 1) == 1
        and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


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
    made = result.producer()
    assert made is not None
    node.name, made.name = made.name, node.name
    editor.replace(output, editor.add_transpose(result, TO_NCHW, before=node))


def pack(weight: NDArray[Any]) -> NDArray[Any]:
    """Weights (out, in, height, width) as the kernels read them: (blocks, in, height, width, 16).

    Output channel k is lane k % 16 of block k // 16; lanes without a channel are zero.
    """
    missing = -len(weight) % LANES
    whole = np.pad(weight, [(0, missing), (0, 0), (0, 0), (0, 0)])
    blocks = whole.reshape(-1, LANES, *weight.shape[1:])
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 4, 1))
