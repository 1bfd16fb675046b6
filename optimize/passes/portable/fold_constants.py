"""Compute what doesn't depend on the inputs, and remove nodes that change nothing.

From libraries: onnxscript's constant folder (it leaves ConstantOfShape alone and makes nothing
larger than its limits; the only large weight that it reads is one used by a Transpose alone) and
its basic rules (consecutive casts, slices, transposes, reshapes), and onnx_ir's removal of dead
code, duplicates and equal small constants. Our own: constant targets of Reshape, since
onnxscript's rule handles at most one free dimension; and the detour by which torch's exporter
transposes keys, which hides attention from the engines that look for it. Left out:
slice_split_rule, which compares every two nodes and took ten times as long as all others.
"""

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter.pattern import RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.dims import Dim, dim, dim_values
from latentforge.optimize.passes.matching import Declined, attempt, producer_of
from latentforge.optimize.passes.rewriting import Editor, apply_named, remove_unused

__all__ = ["fold_constants"]

_RULES = RewriteRuleSet(
    [
        rules.add_0_rule,
        rules.sub_0_rule,
        rules.mul_by_1_rule,
        rules.div_by_1_rule,
        rules.dropout_inference_rule,
        rules.dropout_zero_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.reshape_reshape_rule,
    ]
)

_SMALL = 16
"""Elements up to which equal constants become one: scalars and shapes, but no weights."""

_ROUNDS = 8


def fold_constants(model: ir.Model) -> int:
    """Fold constants, and remove dead, duplicate and idle nodes.

    Returns:
        The number of nodes that were removed or take a constant shape now.
    """
    before, shaped = list(model.graph), 0
    for _ in range(_ROUNDS):
        nodes = list(model.graph)
        apply_named(_fold, model)
        _merge_key_transposes(model.graph)
        changed = _fix_reshapes(model.graph)
        remove_unused(model)
        shaped += changed
        if list(model.graph) == nodes and not changed:
            break
    return sum(node.graph is None for node in before) + shaped


def _fold(model: ir.Model) -> int:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    fold_constants_ir(model, onnx_shape_inference=True)
    _RULES.apply_to_model(model)
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=_SMALL)(model)
    common.CommonSubexpressionEliminationPass()(model)
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    return 0


def _merge_key_transposes(graph: ir.Graph) -> None:
    """Transpose the last two of four axes directly instead of through three axes.

    ::

        x (b,h,s,d) ─ Reshape (b*h,s,d) ─ Transpose (b*h,d,s) ─ Reshape (b,h,d,s) ─ y
     ->
        x (b,h,s,d) ─ Transpose (b,h,d,s) ─ y
    """
    editor = Editor(graph)
    for node in graph:
        if (x := attempt(_match_key_transpose, node)) is not None:
            transposed = editor.add_transpose(x, (0, 1, 3, 2), before=node)
            editor.replace(node.outputs[0], transposed)


def _match_key_transpose(node: ir.Node) -> ir.Value | None:
    """Return the (b, h, s, d) that Reshape, Transpose and this Reshape transpose."""
    transposed = producer_of(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
    merged = producer_of(transposed.inputs[0], "Reshape") if transposed is not None else None
    if transposed is None or merged is None or (x := merged.inputs[0]) is None:
        return None
    perm = transposed.attributes.get_ints("perm", ())
    if tuple(perm) != (0, 2, 1) or x.shape is None or len(x.shape) != 4:
        return None
    batch, heads, rows, columns = (dim(x, axis) for axis in range(4))
    if not _makes(merged, [None, rows, columns]):
        raise Declined("the Reshape before its Transpose does not merge the first two axes")
    if not _makes(node, [batch, heads, columns, rows]):
        raise Declined("it does not restore the axes that were merged before its Transpose")
    return x


def _makes(node: ir.Node, shape: list[Dim | None]) -> bool:
    """Return True if a Reshape makes this shape; one unknown size follows from the others."""
    target = dim_values(node.inputs[1])
    if target is None or len(target) != len(shape):
        return False
    wrong = [item for item, size in zip(target, shape, strict=True) if item != size]
    return len(wrong) <= 1 and 0 not in target


def _fix_reshapes(graph: ir.Graph) -> int:
    """Give each Reshape a constant target where there is one.

    ::

        x (b,s,768) ─┬─ Shape (b) ─ Concat (b, -1, 12, 64) ─┐
                     └────────────────────────────────── Reshape ─ y
     ->
        x ─ Reshape (0, -1, 12, 64) ─ y
    """
    editor, count = Editor(graph), 0
    for node in graph:
        if node.op_type != "Reshape" or node.domain or (target := attempt(_target, node)) is None:
            continue
        name = f"{node.name}/shape"
        value = editor.add_initializer(name, ir.tensor(target, dtype=ir.DataType.INT64))
        node.replace_input_with(1, value)
        node.attributes.add(ir.AttrInt64("allowzero", 0))
        count += 1
    return count


def _target(node: ir.Node) -> list[int] | None:
    """Return the constant target of a Reshape: 0 copies a size, and -1 is inferred, once at most.

    Returns:
        The target, or None if it is constant already.

    Raises:
        Declined: the sizes are not those of the input.
    """
    data, shape = node.inputs[0], node.inputs[1]
    if constant(shape) is not None:
        return None
    items = dim_values(shape)
    if data is None or data.shape is None or items is None:
        raise Declined("the shape of its input or the sizes of its target are unknown")
    rank, output = len(data.shape), node.outputs[0]
    target = []
    for axis, item in enumerate(items):
        size = item if isinstance(item, int) else dim(output, axis) if output.shape else item
        copied = axis < rank and dim(data, axis) in (item, size)
        target.append(size if isinstance(size, int) else 0 if copied else -1)
    if 0 in [item for item in items if isinstance(item, int)]:
        raise Declined("its target has a size of 0")
    if target.count(-1) > 1:
        raise Declined("several sizes of its target are not those of its input")
    return target
