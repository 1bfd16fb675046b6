"""Remove the Transposes between operators that work with channels last.

``nhwc_conv`` and ``native_conv`` put two Transposes around each operator. Here those to NCHW move
down through operators that work in any layout, until they meet their inverse. Neither onnxscript
nor onnx_ir has rules that move them.
"""

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.dims import dim
from latentforge.optimize.passes.matching import (
    Declined,
    attempt,
    input_at,
    is_channel_vector,
    producer_of,
    scalar,
)
from latentforge.optimize.passes.rewriting import TO_NCHW, TO_NHWC, Editor, remove_unused

__all__ = ["merge_transposes"]

_SCALES, _SIZES = 2, 3  # inputs of Resize

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Sigmoid", "Gelu", "QuickGelu", "Cast"})


def merge_transposes(model: ir.Model) -> int:
    """Move Transposes to NCHW below what works in any layout, and remove pairs of inverses.

    ::

        A ─ to NCHW ─ Op ─ to NHWC ─ B
     ->
        A ─ Op ─ to NCHW ─ to NHWC ─ B
     ->
        A ─ Op ─ B

    Op is elementwise, Concat over channels, or nearest Resize by constant scales or to sizes.

    Images that are flattened to tokens, and tokens that become images, are transposed before the
    Reshape instead of after it, where channels last need no Transpose::

        image ─ to NCHW ─ Reshape (b,c,h*w) ─ Transpose (b,h*w,c)    ->    image ─ Reshape (b,h*w,c)
        tokens ─ Transpose (b,c,h*w) ─ Reshape (b,c,h,w)  ->  tokens ─ Reshape (b,h,w,c) ─ to NCHW

    Returns:
        The number of nodes moved across, pairs removed, and Reshapes exchanged.
    """
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if node.op_type == "Transpose":
            count += _cancel(node) or _to_tokens(editor, node)
        elif node.op_type == "Reshape":
            count += _from_tokens(editor, node)
        elif node.op_type == "Shape":
            count += _measure(editor, node)
        elif _reads_nchw(node) and attempt(_check_movable, node) is not None:
            _sink(editor, node)
            count += 1
    remove_unused(model)
    return count


def _untransposed(value: ir.Value | None, perm: tuple[int, ...]) -> ir.Value | None:
    """Return the input of the Transpose by ``perm`` that computes a value, or None."""
    node = producer_of(value, "Transpose")
    return node.inputs[0] if node and tuple(node.attributes.get_ints("perm", ())) == perm else None


def _reads_nchw(node: ir.Node) -> bool:
    """Return True if an input of a node was transposed to NCHW."""
    return any(_untransposed(value, TO_NCHW) for value in node.inputs)


def _cancel(node: ir.Node) -> bool:
    """Remove a Transpose of its inverse."""
    perm = tuple(node.attributes.get_ints("perm", ()))
    inverse = tuple(int(axis) for axis in np.argsort(perm))
    value = _untransposed(node.inputs[0], inverse)
    if value is None or not perm or node.outputs[0].is_graph_output():
        return False
    ir.convenience.replace_all_uses_with(node.outputs[0], value)
    return True


def _to_tokens(editor: Editor, node: ir.Node) -> bool:
    """Reshape an image to tokens (batch, height * width, channels) without going through NCHW."""
    flat = producer_of(node.inputs[0], "Reshape")
    image = flat.inputs[0] if flat is not None else None
    rows, output = _untransposed(image, TO_NCHW), node.outputs[0]
    if image is None or rows is None or tuple(node.attributes.get_ints("perm", ())) != (0, 2, 1):
        return False
    channels = dim(image, 1)
    if dim(output, 0) != dim(image, 0) or dim(output, 2) != channels:
        return False
    if not isinstance(channels, int):
        return False
    target = np.array([0, -1, channels], np.int64)
    shape = editor.add_initializer(f"{output.name}/shape", target)
    tokens = editor.add("Reshape", [rows, shape], before=node, shape=output.shape)
    editor.replace(output, tokens)
    return True


def _measure(editor: Editor, node: ir.Node) -> bool:
    """Read the sizes of an image from the image before its Transpose."""
    rows, output = _untransposed(node.inputs[0], TO_NCHW), node.outputs[0]
    axes = TO_NCHW[node.attributes.get_int("start", 0) : node.attributes.get_int("end", 4)]
    if rows is None or not axes:
        return False
    if len(axes) > 1 and not _sizes_resize(output):
        return False
    if len(axes) > 1:
        whole = editor.add("Shape", [rows], before=node, shape=[4])
        whole.type = output.type or ir.TensorType(ir.DataType.INT64)
        order = editor.add_initializer(f"{output.name}/order", np.array(axes, np.int64))
        sizes = editor.add("Gather", [whole, order], before=node, shape=[len(axes)])
        editor.replace(output, sizes)
        return True
    node.replace_input_with(0, rows)
    node.attributes.update(
        {"start": ir.AttrInt64("start", axes[0]), "end": ir.AttrInt64("end", axes[0] + 1)}
    )
    return True


def _sizes_resize(sizes: ir.Value) -> bool:
    """Return True if sizes are for Resizes alone: other Reshapes have rewrites of their own."""
    consumers = sizes.consumers()
    return bool(consumers) and all(
        node.op_type == "Resize" or (node.op_type == "Concat" and _sizes_resize(node.outputs[0]))
        for node in consumers
    )


def _from_tokens(editor: Editor, node: ir.Node) -> bool:
    """Reshape tokens to an image with channels last, and transpose that."""
    tokens, target = _untransposed(node.inputs[0], (0, 2, 1)), node.inputs[1]
    output = node.outputs[0]
    if tokens is None or target is None or output.shape is None or len(output.shape) != 4:
        return False
    numbers = constant(target)
    if dim(output, 0) != dim(tokens, 0) or dim(output, 1) != dim(tokens, 2):
        return False
    if numbers is not None and 0 in numbers[1:]:  # 0 copies the size of another axis then
        return False
    order = editor.add_initializer(f"{output.name}/order", np.array(TO_NHWC, np.int64))
    nhwc = editor.add("Gather", [target, order], before=node, shape=[4])
    rows = editor.add(
        "Reshape",
        [tokens, nhwc],
        before=node,
        shape=[output.shape[axis] for axis in TO_NHWC],
        attributes={"allowzero": 0},
    )
    editor.replace(output, editor.add_transpose(rows, TO_NCHW, before=node))
    return True


def _check_movable(node: ir.Node) -> bool:
    """Return True for a node that can work on images with channels last.

    Raises:
        Declined: it depends on the layout, or one of its inputs cannot be converted.
    """
    if node.op_type == "Resize" and not node.domain:
        _check_resize(node)
    elif node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (1, -3):
        if any(_untransposed(value, TO_NCHW) is None for value in node.inputs):
            raise Declined("Concat also joins values that were not transposed to NCHW")
    elif node.op_type not in _ELEMENTWISE:
        raise Declined(f"{node.op_type} depends on the layout")
    elif not all(_convertible(node, value) for value in node.inputs):
        raise Declined(f"{node.op_type} has an operand that is not converted to channels last")
    return True


def _check_resize(node: ir.Node) -> None:
    """Decline a Resize unless it is by constant scales or to sizes, and by nearest neighbours."""
    if "axes" in node.attributes:
        raise Declined("Resize is of some axes alone")
    if input_at(node, _SIZES) is None:
        scales = constant(input_at(node, _SCALES))
        if scales is None or scales.size != 4:
            raise Declined("Resize is not by four constant scales")
    if (mode := node.attributes.get_string("mode", "nearest")) != "nearest":
        raise Declined(f"Resize is {mode}, not nearest")


def _convertible(node: ir.Node, value: ir.Value | None) -> bool:
    """Return True if an operand of an elementwise node is converted to channels last for little."""
    return (
        _untransposed(value, TO_NCHW) is not None
        or scalar(value) is not None
        or _channels(value) is not None
        or _unsqueezed(value) is not None
        or _is_pixel(value)
        or _is_residual(node, value)
    )


def _is_residual(node: ir.Node, value: ir.Value | None) -> bool:
    """Return True if a value in NCHW is a summand as large as the sum, which stays NHWC then."""
    output = node.outputs[0]
    if node.op_type != "Add" or value is None or value.shape is None or output.shape is None:
        return False
    whole = len(value.shape) == len(output.shape) == 4
    return whole and all(dim(value, axis) == dim(output, axis) for axis in range(4))


def _channels(value: ir.Value | None) -> int | None:
    """Return the number of channels of a constant (channels, 1, 1), or None."""
    if value is None or value.shape is None or len(value.shape) not in (3, 4):
        return None
    channels = dim(value, -3)
    return channels if isinstance(channels, int) and is_channel_vector(value, channels, 2) else None


def _unsqueezed(value: ir.Value | None) -> ir.Value | None:
    """Return the (batch, channels) that an Unsqueeze turns into (batch, channels, 1, 1)."""
    node = producer_of(value, "Unsqueeze")
    axes = constant(node.inputs[1]) if node is not None else None
    matches = axes is not None and axes.tolist() == [2, 3]
    return node.inputs[0] if node is not None and matches else None


def _is_pixel(value: ir.Value | None) -> bool:
    """Return True if a value is an image of one pixel."""
    whole = value is not None and value.shape is not None and len(value.shape) == 4
    return value is not None and whole and dim(value, 2) == dim(value, 3) == 1


def _sink(editor: Editor, node: ir.Node) -> None:
    """Replace a node of NCHW with one of NHWC and a Transpose behind it."""
    inputs = _nhwc_inputs(editor, node)
    output = node.outputs[0]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "Concat":
        attributes["axis"] = 3
    result = editor.add(
        node.op_type,
        inputs,
        before=node,
        domain=node.domain,
        shape=None if output.shape is None else [output.shape[axis] for axis in TO_NHWC],
        attributes=attributes,
    )
    result.type = output.type
    rows = result.producer()
    assert rows is not None
    node.name, rows.name = rows.name, node.name
    editor.replace(output, editor.add_transpose(result, TO_NCHW, before=node))


def _nhwc_inputs(editor: Editor, node: ir.Node) -> list[ir.Value | None]:
    """Return the inputs of a node with channels last."""
    if node.op_type == "Resize":
        return _resize_inputs(editor, node)
    return [_to_nhwc(editor, node, value) for value in node.inputs]


def _to_nhwc(editor: Editor, node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """Return an operand with channels last."""
    if (rows := _untransposed(value, TO_NCHW)) is not None or value is None:
        return rows
    if (flat := _unsqueezed(value)) is not None:
        axes = editor.add_initializer(f"{value.name}/axes", np.array([1, 2], np.int64))
        shape = [dim(flat, 0), 1, 1, dim(flat, 1)] if flat.shape is not None else None
        return editor.add("Unsqueeze", [flat, axes], before=node, shape=shape)
    if _channels(value) is not None:
        array = constant(value)
        assert array is not None
        return editor.add_initializer(f"{value.name}/nhwc", array.reshape(-1))
    whole = _is_residual(node, value) or _is_pixel(value)
    return editor.add_transpose(value, TO_NHWC, before=node) if whole else value


def _resize_inputs(editor: Editor, node: ir.Node) -> list[ir.Value | None]:
    """Return the inputs of a Resize by constant scales, or to sizes, with channels last."""
    image, region, scales = node.inputs[:3]
    if (sizes := input_at(node, _SIZES)) is not None:
        order = editor.add_initializer(f"{sizes.name}/order", np.array(TO_NHWC, np.int64))
        nhwc = editor.add("Gather", [sizes, order], before=node, shape=[4])
        return [_untransposed(image, TO_NCHW), region, None, nhwc]
    array = constant(scales)
    assert scales is not None and array is not None
    nhwc = editor.add_initializer(f"{scales.name}/nhwc", array[list(TO_NHWC)])
    return [_untransposed(image, TO_NCHW), region, nhwc]
