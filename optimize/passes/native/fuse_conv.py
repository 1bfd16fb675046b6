"""Merge into latentforge's Conv what stands next to it.

A Conv normalizes, activates and upsamples while it reads its input, and adds the time embedding
and the residual while it writes its output. ``native/conv.py`` has the operators' definitions.
"""

from functools import partial

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.dims import dim
from latentforge.optimize.passes.matching import (
    Declined,
    attempt,
    input_at,
    is_native,
    producer_of,
)
from latentforge.optimize.passes.rewriting import TO_NHWC, Editor, absorb_add, remove_unused
from latentforge.runtime.kernels import DOMAIN

__all__ = ["fuse_conv"]

_X, _SCALE, _ROW, _RESIDUAL, _SIZE = 0, 3, 5, 6, 7  # inputs of Conv


def fuse_conv(model: ir.Model) -> int:
    """Let each latentforge Conv normalize and enlarge its input, and add to its output.

    ::

        x ─ [GroupNorm [silu]] or [Resize] ─ Conv ─ [Add row] ─ [Add residual] ─ y
     ->
        x ─┬──────────────────────────────┬─ Conv ([upsample], [silu], row, residual, size) ─ y
           └─ [GroupScale (scale, shift)] ┘

    Returns:
        The number of nodes merged.
    """
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if is_native(node, "Conv"):
            if (resize := attempt(_match_resize, node)) is not None:
                _merge_resize(editor, node, resize)
                count += 1
        elif is_native(node, "GroupNorm"):
            if attempt(_check_norm, node) is not None:
                _merge_norm(editor, node)
                count += 1
        elif node.op_type == "Add" and not node.domain:
            count += absorb_add(editor, node, "Conv", partial(_summand_input, editor))
    remove_unused(model)
    return count


def _match_resize(conv: ir.Node) -> ir.Node | None:
    """Return the Resize that enlarges the image before a Conv, or None if none does."""
    resize, weight = producer_of(conv.inputs[_X], "Resize"), conv.inputs[1]
    if resize is None or resize.inputs[0] is None:
        return None
    if weight is None or weight.shape is None or weight.shape[2] != 3:
        raise Declined("its kernel is not 3x3, so it cannot read a Resize's input")
    if conv.attributes.get_int("stride", 1) != 1 or conv.attributes.get_int("upsample", 1) != 1:
        raise Declined("it has a stride or upsamples already, so it cannot read a Resize's input")
    if not _enlarges(resize):
        raise Declined(
            "the Resize before it neither doubles nor is to a size, by nearest neighbours"
        )
    if input_at(conv, _SCALE) is not None:
        raise Declined("it normalizes its input, so it cannot read a Resize's input")
    return resize


def _merge_resize(editor: Editor, conv: ir.Node, resize: ir.Node) -> None:
    conv.replace_input_with(_X, resize.inputs[0])
    if (size := input_at(resize, 3)) is not None:
        editor.set_input(conv, _SIZE, size)
    else:
        conv.attributes.add(ir.AttrInt64("upsample", 2))


def _enlarges(resize: ir.Node) -> bool:
    """Return True if a Resize doubles height and width, or is to a size, by nearest neighbours."""
    scales = constant(input_at(resize, 2))
    modes = {
        "mode": "nearest",
        "nearest_mode": "floor",
        "coordinate_transformation_mode": "asymmetric",
    }
    same = all(resize.attributes.get_string(name, "") == mode for name, mode in modes.items())
    twice = scales is not None and scales.tolist() == [1, 2, 2, 1]
    sized = input_at(resize, 3) is not None
    return same and twice != sized and "axes" not in resize.attributes


def _check_norm(norm: ir.Node) -> bool:
    """Return True for a GroupNorm that all of its consumers can compute themselves.

    Raises:
        Declined: one of them cannot.
    """
    output, uses = norm.outputs[0], norm.outputs[0].uses()
    if norm.inputs[0] is None or not uses or output.is_graph_output():
        raise Declined("its output is not consumed by Conv alone")
    for use in uses:
        if not is_native(use.node, "Conv") or use.idx != _X:
            raise Declined(f"its output is consumed by {use.node.op_type}, not by Conv alone")
        if input_at(use.node, _SCALE) is not None:
            raise Declined("the Conv behind it normalizes its input already")
    return True


def _merge_norm(editor: Editor, norm: ir.Node) -> None:
    """Let the consumers of a normalization compute it."""
    x, users = norm.inputs[0], [use.node for use in norm.outputs[0].uses()]
    assert x is not None
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
    group_scale = scale.producer()
    assert group_scale is not None
    shift = group_scale.outputs[1]
    shift.name = editor.unique_name(f"{scale.name}_1")
    shift.type, shift.shape = scale.type, scale.shape
    for user in users:
        for index, value in ((_X, x), (_SCALE, scale), (_SCALE + 1, shift)):
            editor.set_input(user, index, value)
        user.attributes.add(ir.AttrInt64("silu", norm.attributes.get_int("silu", 0)))


def _summand_input(editor: Editor, conv: ir.Node, summand: ir.Value) -> tuple[int, ir.Value] | None:
    """Return the free input of a Conv that adds a summand to its output, and its value there."""
    output = conv.outputs[0]
    if summand.shape is None or output.shape is None or len(summand.shape) != 4:
        return None
    if input_at(conv, _ROW) is None and _is_row(summand, output):
        return _ROW, _row(editor, summand, before=output.consumers()[0])
    whole = all(dim(summand, axis) == dim(output, axis) for axis in range(4))
    return (_RESIDUAL, summand) if input_at(conv, _RESIDUAL) is None and whole else None


def _is_row(value: ir.Value, output: ir.Value) -> bool:
    """Return True if a value has one number for each channel of an output, for all pixels."""
    alike = dim(value, 0) in (1, dim(output, 0)) and dim(value, 3) == dim(output, 3)
    return alike and dim(value, 1) == dim(value, 2) == 1


def _row(editor: Editor, value: ir.Value, *, before: ir.Node) -> ir.Value:
    """Return a row as (batch, channels), from before its Unsqueeze or Transpose if it has one."""
    if (unsqueeze := producer_of(value, "Unsqueeze")) is not None:
        if (flat := unsqueeze.inputs[0]) is not None and len(flat.shape or ()) == 2:
            return flat
    transposed, axes = producer_of(value, "Transpose"), [1, 2]
    if transposed is not None and transposed.attributes.get_ints("perm", ()) == TO_NHWC:
        assert transposed.inputs[0] is not None
        value, axes = transposed.inputs[0], [2, 3]
    shape = [size for axis, size in enumerate(value.shape or ()) if axis not in axes]
    places = editor.add_initializer(f"{value.name}/axes", np.array(axes, np.int64))
    return editor.add("Squeeze", [value, places], before=before, shape=shape)
