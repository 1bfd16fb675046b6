"""Match what torch's exporter makes of GroupNorm, and fuse it into one operator, channels last.

onnxscript has a rule, which requires constant shapes; our graphs leave batch, height and width
free. It also lacks activations and inputs of rank 3 (the VAE's attention).
``native/conv.py`` fuses the same pattern on CPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.dims import dim, dim_values
from latentforge.optimize.passes.matching import (
    MICROSOFT,
    Declined,
    find,
    is_channel_vector,
    producer_of,
    sole_consumer,
)
from latentforge.optimize.passes.rewriting import (
    TO_NCHW,
    TO_NHWC,
    Editor,
    remove_unused,
    scope_of,
)

__all__ = ["GroupNorm", "fuse_group_norm", "match_group_norm", "replace_in_nhwc"]

CHANNELS_PER_THREAD = 2
"""ONNX Runtime's CUDA kernel reads channels in pairs, which must not belong to two groups."""


@dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """Matched group normalization.

    Attributes:
        x: (batch, channels, height, width) or (batch, channels, length).
        weight: gamma, one number per channel.
        bias: beta, one number per channel.
        groups: number of groups of channels.
        epsilon: added to variances.
        scope: module that it is named after.
        last: node whose output is replaced.
        swish: True if it includes the SiLU that follows.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value
    groups: int
    epsilon: float
    scope: str
    last: ir.Node
    swish: bool


def fuse_group_norm(model: ir.Model) -> int:
    """Replace Reshape, InstanceNormalization, Reshape, Mul, Add [, SiLU] with one GroupNorm.

    ::

        x (b,c,h,w) ─ Reshape (b,g,-1) ─ InstanceNormalization (scale 1, bias 0) ─┐
            ┌─────────────────────────────────────────────────────────────────────┘
            └─ Reshape (b,c,h,w) ─ Mul gamma ─ Add beta ─ [SiLU: Mul by Sigmoid] ─ y
     ->
        x ─ Transpose ─ GroupNorm (gamma, beta, g, [activation]) ─ Transpose ─ y

    ``merge_transposes`` then removes the Transposes.
    """
    editor, count = Editor(model.graph), 0
    for norm in find(model.graph, _match, "InstanceNormalization", domain=None):
        attributes = {"activation": int(norm.swish), "channels_last": 1}
        replace_in_nhwc(editor, norm, MICROSOFT, attributes)
        count += 1
    remove_unused(model)
    return count


def _match(node: ir.Node) -> GroupNorm:
    """Match a group normalization that the CUDA kernel can compute."""
    norm = match_group_norm(node)
    per_group = int(dim(norm.x, 1)) // norm.groups  # type: ignore[arg-type]
    if per_group % CHANNELS_PER_THREAD:
        raise Declined(
            f"the kernel has no variant for {per_group} channels per group, an odd number"
        )
    return norm


def match_group_norm(norm: ir.Node) -> GroupNorm:
    """Match the group normalization that an InstanceNormalization is part of.

    Raises:
        Declined: it is not part of one.
    """
    grouped, whole = producer_of(norm.inputs[0], "Reshape"), sole_consumer(norm.outputs[0])
    scaled = sole_consumer(whole.outputs[0]) if whole is not None else None
    shifted = sole_consumer(scaled.outputs[0]) if scaled is not None else None
    x = grouped.inputs[0] if grouped is not None else None
    if grouped is None or whole is None or scaled is None or shifted is None or x is None:
        raise Declined("it is not between Reshape and a chain of Reshape, Mul, Add")
    if (kinds := (whole.op_type, scaled.op_type, shifted.op_type)) != ("Reshape", "Mul", "Add"):
        raise Declined(f"it is followed by {', '.join(kinds)}, not by Reshape, Mul, Add")
    groups = _check_groups(norm, grouped, whole)
    weight, bias = _other(scaled, whole.outputs[0]), _other(shifted, scaled.outputs[0])
    _check_weights(x, weight, bias)
    assert weight is not None and bias is not None
    last = _silu(shifted)
    return GroupNorm(
        x=x,
        weight=weight,
        bias=bias,
        groups=groups,
        epsilon=norm.attributes.get_float("epsilon", 1e-5),
        scope=scope_of(norm),
        last=last or shifted,
        swish=last is not None,
    )


def _check_weights(x: ir.Value, *weights: ir.Value | None) -> None:
    """Decline unless scale and bias are constants of one number per channel."""
    channels, trailing = dim(x, 1), len(x.shape or ()) - 2
    if not isinstance(channels, int):
        raise Declined("the number of channels is unknown")
    if not all(is_channel_vector(weight, channels, trailing) for weight in weights):
        raise Declined("scale and bias are no constants of one number per channel")


def _check_groups(norm: ir.Node, grouped: ir.Node, whole: ir.Node) -> int:
    """Return the number of groups of a plain normalization between a Reshape and its inverse."""
    x, scale, shift = grouped.inputs[0], constant(norm.inputs[1]), constant(norm.inputs[2])
    if x is None or x.shape is None or len(x.shape) not in (3, 4):
        raise Declined("the input is not of rank 3 or 4")
    if scale is None or shift is None or not ((scale == 1).all() and (shift == 0).all()):
        raise Declined("it scales or shifts its groups")
    target, channels, count = dim_values(grouped.inputs[1]), dim(x, 1), len(scale)
    if target not in ([0, count, -1], [dim(x, 0), count, -1]):
        raise Declined(f"the Reshape before it does not make (batch, {count}, -1)")
    if not isinstance(channels, int) or channels % count:
        raise Declined(f"{count} groups do not divide {channels} channels")
    if not _restores(whole, x):
        raise Declined("the Reshape behind it does not restore the shape of the input")
    return count


def _restores(whole: ir.Node, x: ir.Value) -> bool:
    """Return True if a Reshape makes the shape of a value; one size may be unknown."""
    back = dim_values(whole.inputs[1])
    if back is None or x.shape is None or len(back) != len(x.shape):
        return False
    batch = {dim(x, 0), 0} if not whole.attributes.get_int("allowzero", 0) else {dim(x, 0)}
    wrong = [item for axis, item in enumerate(back[1:], 1) if item != dim(x, axis)]
    wrong += [] if back[0] in batch else back[:1]
    return len(wrong) <= 1 and 0 not in wrong


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the operand of a binary node that is not this value."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _silu(node: ir.Node) -> ir.Node | None:
    """Return the last node of x * sigmoid(x), where x is a node's output with no other use."""
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
    editor: Editor, match: GroupNorm, domain: str, attributes: Mapping[str, Any]
) -> None:
    """Replace a match with Transpose, the GroupNorm of a domain, and Transpose.

    The operator takes rank 4: for an input (batch, channels, length) it gets the image that was
    flattened to it, or else an image of one column.
    """
    x, before, scope = match.x, match.last, match.scope
    flat = len(x.shape or ()) == 3
    image = _image(editor, match) if flat else x
    rows = editor.add_transpose(image, TO_NHWC, before=before, scope=scope)
    weights = [_flat(editor, value) for value in (match.weight, match.bias)]
    normed = editor.add(
        "GroupNorm",
        [rows, *weights],
        before=before,
        scope=scope,
        domain=domain,
        shape=rows.shape,
        attributes={**attributes, "epsilon": match.epsilon, "groups": match.groups},
    )
    result = editor.add_transpose(normed, TO_NCHW, before=before, scope=scope)
    if flat:
        target = editor.add_initializer(f"{scope}/flat", np.array([0, 0, -1], np.int64))
        result = editor.add("Reshape", [result, target], before=before, scope=scope)
    editor.replace(match.last.outputs[0], result)


def _image(editor: Editor, match: GroupNorm) -> ir.Value:
    """Return an input (batch, channels, length) as (batch, channels, height, width)."""
    x, before, scope = match.x, match.last, match.scope
    flattened = producer_of(x, "Reshape")
    image = flattened.inputs[0] if flattened is not None else None
    if image is not None and image.shape is not None and len(image.shape) == 4:
        if dim(image, 0) == dim(x, 0) and dim(image, 1) == dim(x, 1):
            return image
    axes = editor.add_initializer(f"{scope}/axes", np.array([3], np.int64))
    shape = [*(x.shape or ()), 1]
    return editor.add("Unsqueeze", [x, axes], before=before, scope=scope, shape=shape)


def _flat(editor: Editor, value: ir.Value) -> ir.Value:
    """Return a weight with one axis and in float32, as the kernel takes it for any input."""
    array = constant(value)
    assert array is not None
    return editor.add_initializer(f"{value.name}/channels", array.reshape(-1).astype(np.float32))
