"""Move layout transposes."""

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.rewriting import (
    TO_NCHW,
    TO_NHWC,
    Editor,
    dim,
    is_channel_vector,
    producer_of,
    remove_unused,
    scalar,
)

__all__ = ["merge_transposes"]

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Sigmoid", "Gelu", "QuickGelu", "Cast"})


def merge_transposes(model: ir.Model) -> int:
    """Let transposes to NCHW sink below what works in any layout, until they meet their inverse.

    Images that are flattened to tokens and turned, or come from such, are turned first: with
    channels last, nothing is left to turn.

    Returns:
        How many nodes sank, pairs vanished, and turns changed places.
    """
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if node.op_type == "Transpose":
            count += _cancel(node) or _to_tokens(editor, node)
        elif node.op_type == "Reshape":
            count += _from_tokens(editor, node)
        elif node.op_type == "Shape":
            count += _measure(node)
        elif (inputs := _inputs(editor, node)) is not None:
            _sink(editor, node, inputs)
            count += 1
    remove_unused(model)
    return count


def _permuted(value: ir.Value | None, perm: tuple[int, ...]) -> ir.Value | None:
    """What a Transpose by this permutation made the value of."""
    node = producer_of(value, "Transpose")
    return node.inputs[0] if node and tuple(node.attributes.get_ints("perm", ())) == perm else None


def _cancel(node: ir.Node) -> bool:
    perm = tuple(node.attributes.get_ints("perm", ()))
    inverse = tuple(int(axis) for axis in np.argsort(perm))
    value = _permuted(node.inputs[0], inverse)
    if value is None or not perm or node.outputs[0].is_graph_output():
        return False
    ir.convenience.replace_all_uses_with(node.outputs[0], value)
    return True


def _to_tokens(editor: Editor, node: ir.Node) -> bool:
    """Tokens (batch, height * width, channels) of an image that was turned to NCHW before."""
    flat = producer_of(node.inputs[0], "Reshape")
    image = flat.inputs[0] if flat is not None else None
    rows, output = _permuted(image, TO_NCHW), node.outputs[0]
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


def _measure(node: ir.Node) -> bool:
    """Take one size of an image from what it was turned from."""
    rows, start = _permuted(node.inputs[0], TO_NCHW), node.attributes.get_int("start", 0)
    if rows is None or not 0 <= start < 4 or node.attributes.get_int("end", 4) != start + 1:
        return False
    axis = TO_NCHW[start]
    node.replace_input_with(0, rows)
    node.attributes.update(
        {"start": ir.AttrInt64("start", axis), "end": ir.AttrInt64("end", axis + 1)}
    )
    return True


def _from_tokens(editor: Editor, node: ir.Node) -> bool:
    """An image NCHW of tokens that were turned: of these it is made as NHWC, and turned then."""
    tokens, target = _permuted(node.inputs[0], (0, 2, 1)), node.inputs[1]
    output = node.outputs[0]
    if tokens is None or target is None or output.shape is None or len(output.shape) != 4:
        return False
    copied = constant(target)
    if dim(output, 0) != dim(tokens, 0) or dim(output, 1) != dim(tokens, 2):
        return False
    if copied is not None and 0 in copied[1:]:
        return False
    order = editor.add_initializer(f"{output.name}/order", np.array(TO_NHWC, np.int64))
    turned = editor.add("Gather", [target, order], before=node, shape=[4])
    rows = editor.add(
        "Reshape",
        [tokens, turned],
        before=node,
        shape=[output.shape[axis] for axis in TO_NHWC],
        attributes={"allowzero": 0},
    )
    editor.replace(output, editor.add_transpose(rows, TO_NCHW, before=node))
    return True


def _inputs(editor: Editor, node: ir.Node) -> list[ir.Value | None] | None:
    """Inputs in NHWC of a node that may work on these instead, or None."""
    if not any(_permuted(value, TO_NCHW) for value in node.inputs):
        return None
    if node.op_type == "Resize" and not node.domain:
        return _resized(editor, node)
    if node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (1, -3):
        found = [_permuted(value, TO_NCHW) for value in node.inputs]
        return None if None in found else found
    if node.op_type not in _ELEMENTWISE or not _can_move(node):
        return None
    return [_moved(editor, node, value) for value in node.inputs]


def _can_move(node: ir.Node) -> bool:
    return all(
        _permuted(value, TO_NCHW) is not None
        or scalar(value) is not None
        or _channels(value) is not None
        or _spread(value) is not None
        or _pixel(value)
        or _residual(node, value)
        for value in node.inputs
    )


def _residual(node: ir.Node, value: ir.Value | None) -> bool:
    """Whether a value in NCHW is worth turning: as large as a sum that stays NHWC thereby."""
    output = node.outputs[0]
    if node.op_type != "Add" or value is None or value.shape is None or output.shape is None:
        return False
    whole = len(value.shape) == len(output.shape) == 4
    return whole and all(dim(value, axis) == dim(output, axis) for axis in range(4))


def _channels(value: ir.Value | None) -> int | None:
    """The channels of a constant of one number each, (channels, 1, 1)."""
    if value is None or value.shape is None or len(value.shape) not in (3, 4):
        return None
    channels = dim(value, -3)
    return channels if isinstance(channels, int) and is_channel_vector(value, channels, 2) else None


def _spread(value: ir.Value | None) -> ir.Value | None:
    """The (batch, channels) of which an Unsqueeze makes (batch, channels, 1, 1)."""
    node = producer_of(value, "Unsqueeze")
    axes = constant(node.inputs[1]) if node is not None else None
    fits = axes is not None and axes.tolist() == [2, 3]
    return node.inputs[0] if node is not None and fits else None


def _pixel(value: ir.Value | None) -> bool:
    """Whether a value is an image of a single pixel."""
    whole = value is not None and value.shape is not None and len(value.shape) == 4
    return value is not None and whole and dim(value, 2) == dim(value, 3) == 1


def _moved(editor: Editor, node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    if (rows := _permuted(value, TO_NCHW)) is not None or value is None:
        return rows
    if (flat := _spread(value)) is not None:
        axes = editor.add_initializer(f"{value.name}/axes", np.array([1, 2], np.int64))
        shape = [dim(flat, 0), 1, 1, dim(flat, 1)] if flat.shape is not None else None
        return editor.add("Unsqueeze", [flat, axes], before=node, shape=shape)
    if _channels(value) is not None:
        array = constant(value)
        assert array is not None
        return editor.add_initializer(f"{value.name}/nhwc", array.reshape(-1))
    turned = _residual(node, value) or _pixel(value)
    return editor.add_transpose(value, TO_NHWC, before=node) if turned else value


def _resized(editor: Editor, node: ir.Node) -> list[ir.Value | None] | None:
    """Inputs of a Resize by constant scales; other modes than nearest need the layout."""
    inputs = [*node.inputs, None, None, None][:4]
    scales = constant(inputs[2])
    plain = node.attributes.get_string("mode", "nearest") == "nearest"
    if scales is None or scales.size != 4 or inputs[3] is not None or not plain:
        return None
    if "axes" in node.attributes:
        return None
    name = f"{inputs[2].name}/nhwc" if inputs[2] is not None else "scales"
    turned = editor.add_initializer(name, scales[list(TO_NHWC)])
    return [_permuted(inputs[0], TO_NCHW), inputs[1], turned]


def _sink(editor: Editor, node: ir.Node, inputs: list[ir.Value | None]) -> None:
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
