"""Compute what doesn't depend on the inputs, and drop what changes nothing.

Taken from the libraries: onnxscript's constant folder (it leaves ConstantOfShape alone and makes
nothing larger than its limits; no large weight is read but one that a Transpose alone uses) and its
basic rules (casts, slices, transposes, reshapes in a row), and onnx_ir's removal of dead code,
duplicates and small equal constants. Own: targets of Reshape, of which onnxscript's rule only
writes down those with at most one free dimension, and the detour by which torch's exporter
transposes keys, which hides attention from the engines that look for it. Not taken:
slice_split_rule, which compares every two nodes and took ten times as long as all others.
"""

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter.pattern import RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

from latentforge.optimize.graph import constant
from latentforge.optimize.passes.rewriting import (
    Dim,
    Editor,
    apply_named,
    dim,
    dim_values,
    producer_of,
    remove_unused,
)

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
"""Equal constants up to so many elements become one: scalars and shapes, but no weights."""

_ROUNDS = 8


def fold_constants(model: ir.Model) -> int:
    """Fold constants, and remove dead, double and idle nodes.

    Returns:
        How many of the nodes that were there are gone, or take a constant shape now.
    """
    before, shaped = list(model.graph), 0
    for _ in range(_ROUNDS):
        nodes = list(model.graph)
        apply_named(_fold, model)
        _straighten(model.graph)
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


def _straighten(graph: ir.Graph) -> None:
    """Transpose the last two of four axes at once, not by way of three axes."""
    editor = Editor(graph)
    for node in graph:
        turned = producer_of(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
        joined = producer_of(turned.inputs[0], "Reshape") if turned is not None else None
        if turned is None or joined is None or (x := joined.inputs[0]) is None:
            continue
        perm = turned.attributes.get_ints("perm", ())
        if tuple(perm) != (0, 2, 1) or x.shape is None or len(x.shape) != 4:
            continue
        batch, heads, rows, columns = (dim(x, axis) for axis in range(4))
        if _makes(joined, [None, rows, columns]) and _makes(node, [batch, heads, columns, rows]):
            editor.replace(node.outputs[0], editor.add_transpose(x, (0, 1, 3, 2), before=node))


def _makes(node: ir.Node, shape: list[Dim | None]) -> bool:
    """Whether a Reshape gives this shape; one unknown dimension follows from the others."""
    target = dim_values(node.inputs[1])
    if target is None or len(target) != len(shape):
        return False
    wrong = [item for item, wanted in zip(target, shape, strict=True) if item != wanted]
    return len(wrong) <= 1 and 0 not in target


def _fix_reshapes(graph: ir.Graph) -> int:
    """Give each Reshape a constant target that can have one."""
    editor, count = Editor(graph), 0
    for node in graph:
        if node.op_type != "Reshape" or node.domain or (target := _target(node)) is None:
            continue
        name = f"{node.name}/shape"
        value = editor.add_initializer(name, ir.tensor(target, dtype=ir.DataType.INT64))
        node.replace_input_with(1, value)
        node.attributes.add(ir.AttrInt64("allowzero", 0))
        count += 1
    return count


def _target(node: ir.Node) -> list[int] | None:
    """The target of a Reshape in numbers: 0 copies a dimension, and one may be left to count."""
    data, shape = node.inputs[0], node.inputs[1]
    wanted = dim_values(shape)
    if data is None or data.shape is None or wanted is None or constant(shape) is not None:
        return None
    rank, output = len(data.shape), node.outputs[0]
    target = []
    for axis, item in enumerate(wanted):
        known = item if isinstance(item, int) else dim(output, axis) if output.shape else item
        copied = axis < rank and dim(data, axis) in (item, known)
        target.append(known if isinstance(known, int) else 0 if copied else -1)
    fits = target.count(-1) <= 1 and 0 not in [item for item in wanted if isinstance(item, int)]
    return target if fits else None
