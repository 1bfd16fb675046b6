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
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.ort_cuda.group_norm import match_group_norm, replace_in_nhwc
from latentforge.optimize.passes.ort_cuda.nhwc import TO_NCHW, TO_NHWC
from latentforge.optimize.passes.rewriting import (
    Editor,
    given,
    is_native,
    lazily,
    made_by,
    size,
    sweep,
    take_sum,
)
from latentforge.runtime.kernels import DOMAIN

__all__ = ["LANES", "fuse_conv", "native_conv", "pack"]

LANES = 16
"""Output channels that a kernel computes at once."""

_X, _SCALE, _ROW, _RESIDUAL = 0, 3, 5, 6


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
    sweep(model)
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
    x, weight, bias = node.inputs[0], node.inputs[1], given(node, 2)
    assert x is not None and weight is not None and weight.shape is not None
    channels, *rest = weight.shape.numpy()
    shape = [-(-channels // LANES), *rest, LANES]
    packed = editor.initializer(f"{weight.name}/packed", lazily(pack, [weight], shape))
    rows = editor.transpose(x, TO_NHWC, before=node)
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
    editor.replace(output, editor.transpose(result, TO_NCHW, before=node))


def pack(weight: NDArray[Any]) -> NDArray[Any]:
    """Weights (out, in, height, width) as the kernels read them: (blocks, in, height, width, 16).

    Output channel k is lane k % 16 of block k // 16; lanes without a channel are zero.
    """
    missing = -len(weight) % LANES
    whole = np.pad(weight, [(0, missing), (0, 0), (0, 0), (0, 0)])
    blocks = whole.reshape(-1, LANES, *weight.shape[1:])
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 4, 1))


def fuse_conv(model: ir.Model) -> int:
    """Let each Conv of ours normalize and enlarge its input, and add to its output.

    Returns:
        How many nodes it took over.
    """
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if is_native(node, "Conv"):
            count += _take_resize(node)
        elif is_native(node, "GroupNorm"):
            count += _give_norm(editor, node)
        elif node.op_type == "Add" and not node.domain:
            count += take_sum(editor, node, "Conv", partial(_place, editor))
    sweep(model)
    return count


def _take_resize(conv: ir.Node) -> bool:
    """Read an input that was doubled by nearest neighbours as it was before."""
    resize, weight = made_by(conv.inputs[_X], "Resize"), conv.inputs[1]
    if resize is None or weight is None or weight.shape is None or weight.shape[2] != 3:
        return False
    if conv.attributes.get_int("stride", 1) != 1 or conv.attributes.get_int("upsample", 1) != 1:
        return False
    if not _doubles(resize) or given(conv, _SCALE) is not None:
        return False
    conv.replace_input_with(_X, resize.inputs[0])
    conv.attributes.add(ir.AttrInt64("upsample", 2))
    return True


def _doubles(resize: ir.Node) -> bool:
    inputs = [*resize.inputs, None, None, None][:4]
    scales = constant(inputs[2])
    given = {
        "mode": "nearest",
        "nearest_mode": "floor",
        "coordinate_transformation_mode": "asymmetric",
    }
    same = all(resize.attributes.get_string(name, "") == item for name, item in given.items())
    twice = scales is not None and scales.tolist() == [1, 2, 2, 1]
    return same and twice and inputs[3] is None and "axes" not in resize.attributes


def _give_norm(editor: Editor, norm: ir.Node) -> bool:
    """Let those who use a normalization do it themselves, if all of them can."""
    x, output = norm.inputs[0], norm.outputs[0]
    users = [(use.node, use.idx) for use in output.uses()]
    able = all(is_native(user, "Conv") and index == _X for user, index in users)
    fed = any(given(user, _SCALE) is not None for user, _ in users)
    if x is None or not users or not able or fed or output.is_graph_output():
        return False
    attributes = {name: norm.attributes[name].value for name in ("epsilon", "groups")}
    scale = editor.add(
        "GroupScale",
        norm.inputs,
        before=norm,
        domain=DOMAIN,
        shape=None if x.shape is None else [x.shape[0], x.shape[3]],
        outputs=2,
        attributes=attributes,
    )
    made = scale.producer()
    assert made is not None
    shift = made.outputs[1]
    shift.name, shift.type, shift.shape = editor.free(f"{scale.name}_1"), scale.type, scale.shape
    for user, _ in users:
        for index, value in ((_X, x), (_SCALE, scale), (_SCALE + 1, shift)):
            editor.give(user, index, value)
        user.attributes.add(ir.AttrInt64("silu", norm.attributes.get_int("silu", 0)))
    return True


def _place(editor: Editor, conv: ir.Node, added: ir.Value) -> tuple[int, ir.Value] | None:
    """A row for all pixels, or an image like the output, is the input of that name, if free."""
    output = conv.outputs[0]
    if added.shape is None or output.shape is None or len(added.shape) != 4:
        return None
    if given(conv, _ROW) is None and _is_row(added, output):
        return _ROW, _row(editor, added, before=output.consumers()[0])
    whole = all(size(added, axis) == size(output, axis) for axis in range(4))
    return (_RESIDUAL, added) if given(conv, _RESIDUAL) is None and whole else None


def _is_row(value: ir.Value, output: ir.Value) -> bool:
    """Whether a value has one number for each channel of an output, for all pixels."""
    alike = size(value, 0) in (1, size(output, 0)) and size(value, 3) == size(output, 3)
    return alike and size(value, 1) == size(value, 2) == 1


def _row(editor: Editor, value: ir.Value, *, before: ir.Node) -> ir.Value:
    """A row as (batch, channels), taken from before it was given axes or turned."""
    if (made := made_by(value, "Unsqueeze")) is not None and made.inputs[0] is not None:
        if len(made.inputs[0].shape or ()) == 2:
            return made.inputs[0]
    turned, axes = made_by(value, "Transpose"), [1, 2]
    if turned is not None and turned.attributes.get_ints("perm", ()) == TO_NHWC:
        assert turned.inputs[0] is not None
        value, axes = turned.inputs[0], [2, 3]
    shape = [dim for axis, dim in enumerate(value.shape or ()) if axis not in axes]
    where = editor.initializer(f"{value.name}/axes", np.array(axes, np.int64))
    return editor.add("Squeeze", [value, where], before=before, shape=shape)
