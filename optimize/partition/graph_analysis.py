"""Analyses of a graph: the ancestors of a value, the shapes of all values, multiply-accumulates.

Shapes are inferred by ONNX, which has no operators of ONNX Runtime and of latentforge.
A copy of the graph is therefore rewritten first, into standard operators with the same output
shapes and without weights:

    SkipLayerNormalization(x, ...)            Neg(x)                         shape of x
    com.microsoft.NhwcConv(x, w)              Transpose ─ Conv ─ Transpose   channels last
    latentforge.Conv(x, w)                    Transpose ─ Resize ─ Conv ─ Transpose
    latentforge.MatMul(x, w)                  MatMul(x, placeholder)         packed weight
"""

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnxscript.optimizer import fold_constants_ir

from latentforge.optimize.graph import operands
from latentforge.optimize.passes.matching import input_at
from latentforge.optimize.shape_inference import Shape, Specs
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.kernels import DOMAIN

__all__ = ["ancestors", "infer_shapes", "macs"]

_Shapes = Mapping[str, Shape]

_MICROSOFT = "com.microsoft"
_SHAPE_KEEPING = {
    *((DOMAIN, name) for name in ("Attention", "GroupNorm")),
    *((_MICROSOFT, name) for name in ("FastGelu", "Gelu", "GroupNorm", "MultiHeadAttention")),
    *((_MICROSOFT, name) for name in ("QuickGelu", "SkipGroupNorm", "SkipLayerNormalization")),
}
"""Operators whose first output has the shape of their first input."""

_MAX_SHAPE_ELEMENTS = 16
"""Larger initializers are weights, whose values no shape depends on."""

_TO_CHANNELS_FIRST, _TO_CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
_SIZE = 7  # input of latentforge's Conv


def ancestors(value: ir.Value) -> set[ir.Value]:
    """Return all values that a value is computed from, itself included."""
    visited, pending = {value}, [value]
    while pending:
        node = pending.pop().producer()
        for operand in operands(node) if node is not None else ():
            if operand is not None and operand not in visited:
                visited.add(operand)
                pending.append(operand)
    return visited


def macs(model: ir.Model, inputs: Specs, sizes: Mapping[str, int]) -> int:
    """Count the multiply-accumulates of convolutions, matrix products and fused attention.

    A convolution counts as a direct one, also if the engine computes it by Winograd's method.

    Args:
        model: the graph, which is not changed.
        inputs: its inputs, as the manifest describes them.
        sizes: values of the free dimensions.

    Raises:
        SettingsError: a shape that one of these operators works on cannot be inferred.
    """
    shapes = infer_shapes(model, inputs, sizes)
    return sum(_COUNTED[node.op_type](node, shapes) for node in model.graph if _counts(node))


def infer_shapes(model: ir.Model, inputs: Specs, sizes: Mapping[str, int]) -> _Shapes:
    """Infer the shape of each value, also where the graph computes it from other shapes.

    Args:
        model: the graph, which is not changed.
        inputs: its inputs, as the manifest describes them.
        sizes: values of the free dimensions.

    Returns:
        Shapes by name of a value; None stands for a size that cannot be inferred.
    """
    copy = _in_standard_operators(model)
    for value in copy.graph.inputs:
        if (spec := inputs.get(str(value.name))) is not None:
            value.shape = ir.Shape(spec.resolve(sizes))
    for node in copy.graph:
        for value in node.outputs:
            value.shape = None  # it names free dimensions, which have values now
    fold_constants_ir(copy, onnx_shape_inference=True)
    values = ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False)
    return {
        name: tuple(size if isinstance(size, int) else None for size in value.shape)
        for name, value in values.items()
        if value.shape is not None
    }


def _in_standard_operators(model: ir.Model) -> ir.Model:
    """Return a copy with the same shapes, in standard ONNX operators and without weights."""
    copy = model.clone()
    for name, value in list(copy.graph.initializers.items()):
        if value.const_value is not None and value.const_value.size > _MAX_SHAPE_ELEMENTS:
            del copy.graph.initializers[name]
            value.const_value = None
            copy.graph.inputs.append(value)
    for node in list(copy.graph):
        if (node.domain, node.op_type) in _SHAPE_KEEPING:
            _replace(node, [ir.node("Neg", [node.inputs[0]])])
        elif (node.domain, node.op_type) in ((_MICROSOFT, "NhwcConv"), (DOMAIN, "Conv")):
            _replace(node, _standard_conv(node, _placeholder(copy.graph, node, _kernel(node))))
        elif (node.domain, node.op_type) == (DOMAIN, "MatMul"):
            channels, inputs = _kernel(node)[:2]
            columns = channels // 2 if node.attributes.get_int("gated", 0) else channels
            weight = _placeholder(copy.graph, node, (inputs, columns))
            _replace(node, [ir.node("MatMul", [node.inputs[0], weight])])
    return copy


def _counts(node: ir.Node) -> bool:
    return node.op_type in _COUNTED


def _convolution(node: ir.Node, shapes: _Shapes) -> int:
    weight = _kernel(node) if node.domain == DOMAIN else _shape(node.inputs[1], shapes)
    return _count(_shape(node.outputs[0], shapes), node) * _count(weight[1:], node)


def _product(node: ir.Node, shapes: _Shapes) -> int:
    left, right = (_shape(value, shapes) for value in node.inputs[:2])
    if node.domain == DOMAIN:
        right = _kernel(node)[1::-1]
    columns = right[-2 if node.attributes.get_int("transB", 0) else -1 :][:1]
    return _count(left, node) * _count(columns, node)


def _attention(node: ir.Node, shapes: _Shapes) -> int:
    """Count the product of queries and keys, and that of the scores and values."""
    query, key = (_shape(value, shapes) for value in node.inputs[:2])
    return 2 * _count(query, node) * _count(key[1:2], node)


_COUNTED: Mapping[str, Callable[[ir.Node, _Shapes], int]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "FusedConv", "NhwcConv"), _convolution),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger"), _product),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), _attention),
}


def _shape(value: ir.Value | None, shapes: _Shapes) -> Shape:
    if value is not None and value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    return shapes.get(str(value.name), (None,)) if value is not None else (None,)


def _count(shape: Shape, node: ir.Node) -> int:
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) < len(shape):
        raise SettingsError(
            f"{node.name} has an operand of shape {list(shape)}: its multiply-accumulates cannot "
            "be counted: give the sizes of all free dimensions"
        )
    return math.prod(sizes)


def _kernel(node: ir.Node) -> tuple[int, ...]:
    """Return the weight's shape in Conv's order: output and input channels, height, width.

    Args:
        node: a convolution with channels last, or latentforge's own Conv or MatMul.
    """
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    sizes = weight.shape.numpy()
    if node.domain == DOMAIN:  # packed: axis 0 is blocks of 16 output channels
        return (node.attributes["channels"].as_int(), *sizes[1:4])
    return (sizes[0], sizes[3], sizes[1], sizes[2])


def _placeholder(graph: ir.Graph, node: ir.Node, shape: tuple[int, ...]) -> ir.Value:
    """Add an input that stands for a weight in the layout of the standard operator."""
    weight = ir.Value(name=f"{node.name}/kernel", type=ir.TensorType(ir.DataType.FLOAT))
    weight.shape = ir.Shape(shape)
    graph.inputs.append(weight)
    return weight


def _standard_conv(node: ir.Node, weight: ir.Value) -> list[ir.Node]:
    """Build standard nodes with the output shape of a convolution whose channels are last."""
    nodes = [ir.node("Transpose", [node.inputs[0]], {"perm": _TO_CHANNELS_FIRST})]
    original = node.attributes
    attributes = {key: original[key] for key in ("strides", "pads") if key in original}
    if node.domain == DOMAIN:
        top, left, bottom, right = original["pads"].as_ints()
        stride, up = (original.get_int(key, 1) for key in ("stride", "upsample"))
        nodes += _enlarging(nodes[-1].outputs[0], up, input_at(node, _SIZE))
        pads = ir.AttrInt64s("pads", [top, left, bottom, right])
        attributes = {"strides": ir.AttrInt64s("strides", [stride, stride]), "pads": pads}
    nodes.append(ir.node("Conv", [nodes[-1].outputs[0], weight], attributes))
    return [*nodes, ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": _TO_CHANNELS_LAST})]


def _enlarging(image: ir.Value, up: int, size: ir.Value | None) -> list[ir.Node]:
    """Build nodes that enlarge an image (n, c, h, w) by a factor, or to a size (n, h, w, c)."""
    if size is None:
        scales = ir.node("Constant", [], {"value_floats": [1.0, 1.0, float(up), float(up)]})
        return [scales, ir.node("Resize", [image, None, scales.outputs[0]])]
    order = ir.node("Constant", [], {"value_ints": list(_TO_CHANNELS_FIRST)})
    sizes = ir.node("Gather", [size, order.outputs[0]])
    return [order, sizes, ir.node("Resize", [image, None, None, sizes.outputs[0]])]


def _replace(node: ir.Node, nodes: list[ir.Node]) -> None:
    graph, old, new = node.graph, node.outputs[0], nodes[-1].outputs[0]
    assert graph is not None
    graph.insert_before(node, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, new.type = old.name, old.type
    old.name = f"{old.name}/replaced"
