"""Fuse around latentforge's Conv."""

from functools import partial

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.rewriting import (
    TO_NHWC,
    Editor,
    absorb_add,
    dim,
    input_at,
    is_native,
    producer_of,
    remove_unused,
)
from latentforge.runtime.kernels import DOMAIN

__all__ = ["fuse_conv"]

_X, _SCALE, _ROW, _RESIDUAL = 0, 3, 5, 6


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
            count += absorb_add(editor, node, "Conv", partial(_place, editor))
    remove_unused(model)
    return count


def _take_resize(conv: ir.Node) -> bool:
    """Read an input that was doubled by nearest neighbours as it was before."""
    resize, weight = producer_of(conv.inputs[_X], "Resize"), conv.inputs[1]
    if resize is None or weight is None or weight.shape is None or weight.shape[2] != 3:
        return False
    if conv.attributes.get_int("stride", 1) != 1 or conv.attributes.get_int("upsample", 1) != 1:
        return False
    if not _doubles(resize) or input_at(conv, _SCALE) is not None:
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
    fed = any(input_at(user, _SCALE) is not None for user, _ in users)
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
    shift.name, shift.type, shift.shape = (
        editor.unique_name(f"{scale.name}_1"),
        scale.type,
        scale.shape,
    )
    for user, _ in users:
        for index, value in ((_X, x), (_SCALE, scale), (_SCALE + 1, shift)):
            editor.set_input(user, index, value)
        user.attributes.add(ir.AttrInt64("silu", norm.attributes.get_int("silu", 0)))
    return True


def _place(editor: Editor, conv: ir.Node, added: ir.Value) -> tuple[int, ir.Value] | None:
    """A row for all pixels, or an image like the output, is the input of that name, if free."""
    output = conv.outputs[0]
    if added.shape is None or output.shape is None or len(added.shape) != 4:
        return None
    if input_at(conv, _ROW) is None and _is_row(added, output):
        return _ROW, _row(editor, added, before=output.consumers()[0])
    whole = all(dim(added, axis) == dim(output, axis) for axis in range(4))
    return (_RESIDUAL, added) if input_at(conv, _RESIDUAL) is None and whole else None


def _is_row(value: ir.Value, output: ir.Value) -> bool:
    """Whether a value has one number for each channel of an output, for all pixels."""
    alike = dim(value, 0) in (1, dim(output, 0)) and dim(value, 3) == dim(output, 3)
    return alike and dim(value, 1) == dim(value, 2) == 1


def _row(editor: Editor, value: ir.Value, *, before: ir.Node) -> ir.Value:
    """A row as (batch, channels), taken from before it was given axes or turned."""
    if (made := producer_of(value, "Unsqueeze")) is not None and made.inputs[0] is not None:
        if len(made.inputs[0].shape or ()) == 2:
            return made.inputs[0]
    turned, axes = producer_of(value, "Transpose"), [1, 2]
    if turned is not None and turned.attributes.get_ints("perm", ()) == TO_NHWC:
        assert turned.inputs[0] is not None
        value, axes = turned.inputs[0], [2, 3]
    shape = [dim for axis, dim in enumerate(value.shape or ()) if axis not in axes]
    where = editor.add_initializer(f"{value.name}/axes", np.array(axes, np.int64))
    return editor.add("Squeeze", [value, where], before=before, shape=shape)
