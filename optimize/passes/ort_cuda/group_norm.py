"""Find what torch's exporter makes of GroupNorm, and fuse it into one operator, in NHWC.

onnxscript ships a rule, which takes constant shapes only; our graphs leave batch, height and width
free. It knows no activation and no input of rank 3 (the VAE's attention) either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.rewriting import (
    MICROSOFT,
    TO_NCHW,
    TO_NHWC,
    Editor,
    dim,
    dim_values,
    is_channel_vector,
    producer_of,
    remove_unused,
    scope_of,
    sole_consumer,
)

__all__ = ["GroupNorm", "fuse_group_norm", "match_group_norm", "replace_in_nhwc"]

CHANNELS_PER_THREAD = 2
"""ONNX Runtime's CUDA kernel reads channels in pairs, which must not belong to two groups."""


@dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """One group normalization, found.

    Attributes:
        x: (batch, channels, height, width) or (batch, channels, length).
        weight: gamma, one number a channel.
        bias: beta.
        groups: of channels.
        epsilon: added to variances.
        scope: the module that it is named by.
        last: the node whose output is to be replaced.
        swish: whether SiLU follows and is part of it.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value
    groups: int
    epsilon: float
    scope: str
    last: ir.Node
    swish: bool

    @property
    def paired(self) -> bool:
        """Whether ONNX Runtime's CUDA kernel can do it."""
        return int(dim(self.x, 1)) % (self.groups * CHANNELS_PER_THREAD) == 0  # type: ignore[arg-type]


def fuse_group_norm(model: ir.Model) -> int:
    """Replace Reshape, InstanceNormalization, Reshape, Mul, Add [, SiLU] with one GroupNorm."""
    editor, count = Editor(model.graph), 0
    for node in model.graph:
        if (found := match_group_norm(node)) is not None and found.paired:
            own = {"activation": int(found.swish), "channels_last": 1}
            replace_in_nhwc(editor, found, MICROSOFT, own)
            count += 1
    remove_unused(model)
    return count


def match_group_norm(norm: ir.Node) -> GroupNorm | None:
    """What an InstanceNormalization is a part of, or None."""
    if norm.op_type != "InstanceNormalization":
        return None
    grouped, whole = producer_of(norm.inputs[0], "Reshape"), sole_consumer(norm.outputs[0])
    scaled = sole_consumer(whole.outputs[0]) if whole is not None else None
    shifted = sole_consumer(scaled.outputs[0]) if scaled is not None else None
    if grouped is None or whole is None or scaled is None or shifted is None:
        return None
    x = grouped.inputs[0]
    kinds = (whole.op_type, scaled.op_type, shifted.op_type)
    if kinds != ("Reshape", "Mul", "Add") or x is None or not _groups(norm, grouped, whole):
        return None
    weight, bias = _other(scaled, whole.outputs[0]), _other(shifted, scaled.outputs[0])
    channels, trailing = dim(x, 1), len(x.shape or ()) - 2
    if not isinstance(channels, int) or weight is None or bias is None:
        return None
    if not (
        is_channel_vector(weight, channels, trailing)
        and is_channel_vector(bias, channels, trailing)
    ):
        return None
    last = _silu(shifted)
    return GroupNorm(
        x=x,
        weight=weight,
        bias=bias,
        groups=int(dim(norm.inputs[1], 0)),  # type: ignore[arg-type]
        epsilon=norm.attributes.get_float("epsilon", 1e-5),
        scope=scope_of(norm),
        last=last or shifted,
        swish=last is not None,
    )


def _groups(norm: ir.Node, grouped: ir.Node, whole: ir.Node) -> bool:
    """Whether a plain normalization stands between a cut into groups and its undoing."""
    x, scale, shift = grouped.inputs[0], constant(norm.inputs[1]), constant(norm.inputs[2])
    if x is None or x.shape is None or len(x.shape) not in (3, 4) or scale is None or shift is None:
        return False
    target, back = dim_values(grouped.inputs[1]), dim_values(whole.inputs[1])
    channels, count = dim(x, 1), len(scale)
    if target not in ([0, count, -1], [dim(x, 0), count, -1]) or back is None:
        return False
    rows = {dim(x, 0), 0} if not whole.attributes.get_int("allowzero", 0) else {dim(x, 0)}
    wrong = [item for item, axis in zip(back[1:], (1, 2, 3), strict=False) if item != dim(x, axis)]
    wrong += [] if back[:1] and back[0] in rows else back[:1]
    undone = len(back) == len(x.shape) and len(wrong) <= 1 and 0 not in wrong
    plain = bool((scale == 1).all() and (shift == 0).all())
    return undone and plain and isinstance(channels, int) and channels % count == 0


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _silu(node: ir.Node) -> ir.Node | None:
    """The node that ends x * sigmoid(x), where x is this node's and nothing else uses it."""
    value = node.outputs[0]
    user = sole_consumer(value)
    if user is not None and user.op_type == "QuickGelu":
        return user if abs(user.attributes.get_float("alpha", 1.702) - 1) < 1e-6 else None
    users = {user.op_type: user for user in value.consumers()}
    if set(users) != {"Sigmoid", "Mul"} or len(value.uses()) != 2 or value.is_graph_output():
        return None
    sigmoid, mul = users["Sigmoid"], users["Mul"]
    ends = sole_consumer(sigmoid.outputs[0]) is mul and value in mul.inputs
    return mul if ends else None


def replace_in_nhwc(
    editor: Editor, found: GroupNorm, domain: str, attributes: Mapping[str, Any]
) -> None:
    """Put Transpose, GroupNorm of a domain, Transpose in the place of what was found.

    The operator wants rank 4: channels by length are taken as the image that was flattened to
    them, or else as one of a single column.
    """
    x, before, scope = found.x, found.last, found.scope
    flat = len(x.shape or ()) == 3
    image = _image(editor, found) if flat else x
    rows = editor.add_transpose(image, TO_NHWC, before=before, scope=scope)
    weights = [_flat(editor, value) for value in (found.weight, found.bias)]
    normed = editor.add(
        "GroupNorm",
        [rows, *weights],
        before=before,
        scope=scope,
        domain=domain,
        shape=rows.shape,
        attributes={**attributes, "epsilon": found.epsilon, "groups": found.groups},
    )
    result = editor.add_transpose(normed, TO_NCHW, before=before, scope=scope)
    if flat:
        target = editor.add_initializer(f"{scope}/flat", np.array([0, 0, -1], np.int64))
        result = editor.add("Reshape", [result, target], before=before, scope=scope)
    editor.replace(found.last.outputs[0], result)


def _image(editor: Editor, found: GroupNorm) -> ir.Value:
    """Channels by length as an image, (batch, channels, height, width)."""
    x, before, scope = found.x, found.last, found.scope
    flattened = producer_of(x, "Reshape")
    image = flattened.inputs[0] if flattened is not None else None
    if image is not None and image.shape is not None and len(image.shape) == 4:
        if dim(image, 0) == dim(x, 0) and dim(image, 1) == dim(x, 1):
            return image
    axes = editor.add_initializer(f"{scope}/axes", np.array([3], np.int64))
    shape = [*(x.shape or ()), 1]
    return editor.add("Unsqueeze", [x, axes], before=before, scope=scope, shape=shape)


def _flat(editor: Editor, value: ir.Value) -> ir.Value:
    """A weight as one axis of float32, which the kernel wants whatever the input is."""
    array = constant(value)
    assert array is not None
    return editor.add_initializer(f"{value.name}/channels", array.reshape(-1).astype(np.float32))
