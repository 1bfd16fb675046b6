"""Write 8-bit layers into a graph."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import GraphLayer, add_constant, constant, module
from latentforge.optimize.quantize.nodes import add_node, add_variant, replace
from latentforge.optimize.quantize.options import Form
from latentforge.optimize.quantize.ranges import Grid

__all__ = ["Planned", "Writer", "plain", "round_weight", "take_bias"]

Array = NDArray[Any]

_LARGEST_BIAS = 2.0**30  # half of what an int32 holds: a sum of products still comes on top


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A layer that is to be quantized.

    Attributes:
        layer: it, or one of the parts that it was split into.
        name: of the layer as it was found.
        input: the grid of its input.
        output: the grid of its output, where the form needs one.
    """

    layer: GraphLayer
    name: str
    input: Grid
    output: Grid | None


def round_weight(
    array: Array, axis: int, limit: int, *, least: Array | float = 0.0
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A weight in 8 bits, symmetric, with a scale for each channel.

    Args:
        array: the weight.
        axis: of it that makes the channels.
        limit: the largest integer to use.
        least: the least scale of each channel.

    Returns:
        The integers, and (channels,) scales: their product is near the weight.
    """
    others = tuple(index for index in range(array.ndim) if index != axis)
    scale = np.maximum(np.abs(array).max(axis=others) / limit, least).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1.0
    shape = [1] * array.ndim
    shape[axis] = -1
    integers = np.clip(np.rint(array / scale.reshape(shape)), -limit, limit)
    return integers.astype(np.int8), scale


class Writer:
    """Writes planned layers; what quantizes an activation that several read is written once."""

    def __init__(self, graph: ir.Graph, *, limit: int, form: Form) -> None:
        self._graph = graph
        self._limit = limit
        self._form = form
        self._grids: dict[Grid, tuple[ir.Value, ir.Value]] = {}
        self._written: dict[tuple[ir.Value, Grid], ir.Value] = {}

    def write(self, each: Planned) -> None:
        """Put 8-bit nodes in the place of a layer."""
        node, old = each.layer.node, each.layer.weight
        direct = each.layer.linear and self._form == "onnxruntime"
        replace(*(self._product(each) if direct else self._operator(each)))
        if node.graph is not None:  # the bias went into the new node, and what goes is its Add
            self._graph.remove(node, safe=True)
        if not old.uses():  # a large model's would take gigabytes until the end
            self._graph.initializers.pop(str(old.name))

    def rounded(self, value: ir.Value, grid: Grid, before: ir.Node, scope: str) -> ir.Value:
        """An activation on its grid, in float."""
        scale, zero = self._grid(grid)
        inputs = [self._quantized(value, grid, before, scope), scale, zero]
        return add_node(before, "DequantizeLinear", inputs, name=scope, like=value)

    def weight(self, each: Planned) -> ir.Value:
        """A layer's weight, and what makes floats of it."""
        integers, scale = round_weight(each.layer.array, each.layer.out_axis, self._limit)
        return self._stored(each, each.layer.weight, integers, scale, each.layer.out_axis)

    def _operator(self, each: Planned) -> tuple[ir.Value, ir.Value]:
        """A layer's output, and that of the same operator on numbers that were integers."""
        layer, node, scope = each.layer, each.layer.node, module(each.name)
        x = self.rounded(layer.input, each.input, node, scope)
        weight, bias = self.weight(each), list(node.inputs[2:])
        if each.output is not None and bias:
            weight, bias = self._with_integer_bias(each)
        y = add_variant(node, [x, weight, *bias])
        if each.output is not None:
            y = self.rounded(y, each.output, node, scope)
        return layer.output, y

    def _with_integer_bias(self, each: Planned) -> tuple[ir.Value, list[ir.Value | None]]:
        """Weight and bias for a QLinearConv, whose bias is in units of both scales' product."""
        layer, source = each.layer, each.layer.node.inputs[2]
        array, step = constant(source), np.float32(each.input.scale)
        assert source is not None and array is not None
        bias = np.asarray(array, np.float32)
        least = np.abs(bias) / (_LARGEST_BIAS * step)
        integers, scale = round_weight(layer.array, layer.out_axis, self._limit, least=least)
        total = scale * step
        weight = self._stored(each, layer.weight, integers, scale, layer.out_axis)
        sums = np.rint(bias / total).astype(np.int32)
        return weight, [self._stored(each, source, sums, total, 0)]

    def _product(self, each: Planned) -> tuple[ir.Value, ir.Value]:
        """The output of a linear layer and its bias, and that of a MatMulIntegerToFloat."""
        layer, scope = each.layer, module(each.name)
        array = layer.array.T if layer.out_axis == 0 else layer.array
        integers, scale = round_weight(array, 1, self._limit)
        weight = add_constant(self._graph, integers, f"{layer.weight.name}.int8")
        scales = add_constant(self._graph, scale, f"{layer.weight.name}.scale")
        old, bias = take_bias(layer)
        x = self._quantized(layer.input, each.input, layer.node, scope)
        step, zero = self._grid(each.input)
        y = add_node(
            layer.node,
            "MatMulIntegerToFloat",
            [x, weight, step, scales, zero, None, bias],
            name=scope,
            like=old,
            domain="com.microsoft",
            node_name=layer.name,
        )
        self._graph.opset_imports.setdefault("com.microsoft", 1)
        return old, y

    def _stored(
        self, each: Planned, source: ir.Value, integers: Array, scale: Array, axis: int
    ) -> ir.Value:
        """Integers as an initializer, and DequantizeLinear after it."""
        stored = add_constant(self._graph, integers, f"{source.name}.{integers.dtype}")
        scales = add_constant(self._graph, scale, f"{source.name}.scale")
        name, node = module(each.name), each.layer.node
        inputs = [stored, scales]
        return add_node(node, "DequantizeLinear", inputs, name=name, like=source, axis=axis)

    def _quantized(self, value: ir.Value, grid: Grid, before: ir.Node, scope: str) -> ir.Value:
        if (value, grid) not in self._written:
            scale, zero = self._grid(grid)
            inputs = [value, scale, zero]
            made = add_node(
                before, "QuantizeLinear", inputs, name=scope, like=value, dtype=zero.dtype
            )
            self._written[value, grid] = made
        return self._written[value, grid]

    def _grid(self, grid: Grid) -> tuple[ir.Value, ir.Value]:
        """The scale and the zero point of a grid, as initializers."""
        if grid not in self._grids:
            zero = np.asarray(grid.zero, np.int8 if self._form == "qdq" else np.uint8)
            scale = add_constant(self._graph, np.asarray(grid.scale, np.float32), "step")
            self._grids[grid] = scale, add_constant(self._graph, zero, "zero")
        return self._grids[grid]


def take_bias(layer: GraphLayer) -> tuple[ir.Value, ir.Value | None]:
    """What a linear layer and the Add of its bias give, and that bias."""
    node = layer.node
    if len(node.inputs) > 2:
        return layer.output, node.inputs[2]
    users = list(layer.output.uses())
    if len(users) != 1 or users[0].node.op_type != "Add" or layer.output.is_graph_output():
        return layer.output, None
    total, index = users[0].node, users[0].idx
    bias = total.inputs[1 - index]
    array, channels = constant(bias), (layer.weight.shape or ())[layer.out_axis]
    fits = array is not None and array.shape == (channels,)
    return (total.outputs[0], bias) if fits else (layer.output, None)


def plain(layer: GraphLayer) -> bool:
    """Whether a Gemm is a product and one bias an output, and nothing is scaled."""
    node = layer.node
    if node.op_type != "Gemm":
        return True
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    sums = len(node.inputs) < 3 or (
        bias is not None
        and bias.shape == (layer.weight.shape or ())[layer.out_axis : layer.out_axis + 1]
    )
    return sums and all(node.attributes.get_float(name, 1.0) == 1 for name in ("alpha", "beta"))
