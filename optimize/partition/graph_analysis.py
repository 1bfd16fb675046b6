"""What is asked of a graph before it is cut: what values come from, their shapes, what it costs."""

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnxscript.optimizer import fold_constants_ir

from latentforge.optimize.graph import operands
from latentforge.optimize.shape_inference import Shape, Specs
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.kernels import DOMAIN

__all__ = ["before", "macs", "infer_shapes"]

_Known = Mapping[str, Shape]

_MICROSOFT = "com.microsoft"
_SHAPE_KEEPING = {
    *((DOMAIN, name) for name in ("Attention", "GroupNorm")),
    *((_MICROSOFT, name) for name in ("FastGelu", "Gelu", "GroupNorm", "MultiHeadAttention")),
    *((_MICROSOFT, name) for name in ("QuickGelu", "SkipGroupNorm", "SkipLayerNormalization")),
}
"""Operators whose first output has the shape of their first input."""

_SIZES = 16
"""A tensor of sizes has at most so many elements."""

_TO_CHANNELS_FIRST, _TO_CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def before(value: ir.Value) -> set[ir.Value]:
    """All that a value is computed from."""
    found, waiting = {value}, [value]
    while waiting:
        node = waiting.pop().producer()
        for other in operands(node) if node is not None else ():
            if other is not None and other not in found:
                found.add(other)
                waiting.append(other)
    return found


def macs(model: ir.Model, inputs: Specs, sizes: Mapping[str, int]) -> int:
    """Multiply-accumulates of one run in convolutions, products and fused attention.

    A convolution counts as the direct one, however it is computed.

    Args:
        model: the graph, which is left as it is.
        inputs: its own, as the manifest describes them.
        sizes: of the free dimensions.

    Raises:
        SettingsError: the shapes that one of these operators works on are not known.
    """
    known = infer_shapes(model, inputs, sizes)
    return sum(_COUNTED[node.op_type](node, known) for node in model.graph if _counts(node))


def infer_shapes(model: ir.Model, inputs: Specs, sizes: Mapping[str, int]) -> _Known:
    """The shape of each value for one choice of sizes, also where it is computed from sizes.

    Args:
        model: the graph, which is left as it is.
        inputs: its own, as the manifest describes them.
        sizes: of the free dimensions.
    """
    copy = _standard(model)
    for value in copy.graph.inputs:
        if (spec := inputs.get(str(value.name))) is not None:
            value.shape = ir.Shape(spec.resolve(sizes))
    for node in copy.graph:
        for value in node.outputs:
            value.shape = None  # it names what now are numbers
    fold_constants_ir(copy, onnx_shape_inference=True)
    values = ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False)
    return {
        name: tuple(size if isinstance(size, int) else None for size in value.shape)
        for name, value in values.items()
        if value.shape is not None
    }


def _standard(model: ir.Model) -> ir.Model:
    """A copy in ONNX's own operators and without weights, as far as shapes go."""
    copy = model.clone()
    for name, value in list(copy.graph.initializers.items()):
        if value.const_value is not None and value.const_value.size > _SIZES:
            del copy.graph.initializers[name]
            value.const_value = None
            copy.graph.inputs.append(value)
    for node in list(copy.graph):
        if (node.domain, node.op_type) in _SHAPE_KEEPING:
            _replace(node, [ir.node("Neg", [node.inputs[0]])])
        elif (node.domain, node.op_type) in ((_MICROSOFT, "NhwcConv"), (DOMAIN, "Conv")):
            _replace(node, _standard_conv(node, _dummy(copy.graph, node, _kernel(node))))
        elif (node.domain, node.op_type) == (DOMAIN, "MatMul"):
            channels, inputs = _kernel(node)[:2]
            columns = channels // 2 if node.attributes.get_int("gated", 0) else channels
            weight = _dummy(copy.graph, node, (inputs, columns))
            _replace(node, [ir.node("MatMul", [node.inputs[0], weight])])
    return copy


def _counts(node: ir.Node) -> bool:
    return node.op_type in _COUNTED


def _convolution(node: ir.Node, known: _Known) -> int:
    weight = _kernel(node) if node.domain == DOMAIN else _shape(node.inputs[1], known)
    return _count(_shape(node.outputs[0], known), node) * _count(weight[1:], node)


def _product(node: ir.Node, known: _Known) -> int:
    left, right = (_shape(value, known) for value in node.inputs[:2])
    if node.domain == DOMAIN:
        right = _kernel(node)[1::-1]
    columns = right[-2 if node.attributes.get_int("transB", 0) else -1 :][:1]
    return _count(left, node) * _count(columns, node)


def _attention(node: ir.Node, known: _Known) -> int:
    """Scores, and the sum of values that they weigh."""
    query, key = (_shape(value, known) for value in node.inputs[:2])
    return 2 * _count(query, node) * _count(key[1:2], node)


_COUNTED: Mapping[str, Callable[[ir.Node, _Known], int]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "FusedConv", "NhwcConv"), _convolution),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger"), _product),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), _attention),
}


def _shape(value: ir.Value | None, known: _Known) -> Shape:
    if value is not None and value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    return known.get(str(value.name), (None,)) if value is not None else (None,)


def _count(shape: Shape, node: ir.Node) -> int:
    numbers = [size for size in shape if isinstance(size, int)]
    if len(numbers) < len(shape):
        raise SettingsError(
            f"{node.name} works on {list(shape)}: its cost is not known; give all free dimensions"
        )
    return math.prod(numbers)


def _kernel(node: ir.Node) -> tuple[int, ...]:
    """The shape of the weight of a convolution with channels last, or of a product of ours, as
    ONNX's Conv would have it: output channels, input channels, height, width.
    """
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    sizes = weight.shape.numpy()
    if node.domain == DOMAIN:  # packed: sixteenths of the output channels first, their rest last
        return (node.attributes["channels"].as_int(), *sizes[1:4])
    return (sizes[0], sizes[3], sizes[1], sizes[2])


def _dummy(graph: ir.Graph, node: ir.Node, shape: tuple[int, ...]) -> ir.Value:
    """What stands for a weight that another operator takes in another shape."""
    weight = ir.Value(name=f"{node.name}/kernel", type=ir.TensorType(ir.DataType.FLOAT))
    weight.shape = ir.Shape(shape)
    graph.inputs.append(weight)
    return weight


def _standard_conv(node: ir.Node, weight: ir.Value) -> list[ir.Node]:
    """Nodes of ONNX's own that give the shape of a convolution whose channels are last."""
    made = [ir.node("Transpose", [node.inputs[0]], {"perm": _TO_CHANNELS_FIRST})]
    given = node.attributes
    attributes = {key: given[key] for key in ("strides", "pads") if key in given}
    if node.domain == DOMAIN:
        top, left, bottom, right = given["pads"].as_ints()
        stride, up = (given.get_int(key, 1) for key in ("stride", "upsample"))
        scales = ir.node("Constant", [], {"value_floats": [1.0, 1.0, float(up), float(up)]})
        resized = ir.node("Resize", [made[-1].outputs[0], None, scales.outputs[0]])
        made += [scales, resized]
        pads = ir.AttrInt64s("pads", [top, left, bottom, right])
        attributes = {"strides": ir.AttrInt64s("strides", [stride, stride]), "pads": pads}
    made.append(ir.node("Conv", [made[-1].outputs[0], weight], attributes))
    return [*made, ir.node("Transpose", [made[-1].outputs[0]], {"perm": _TO_CHANNELS_LAST})]


def _replace(node: ir.Node, made: list[ir.Node]) -> None:
    graph, old, new = node.graph, node.outputs[0], made[-1].outputs[0]
    assert graph is not None
    graph.insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, new.type = old.name, old.type
    old.name = f"{old.name}/replaced"
