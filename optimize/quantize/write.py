"""Write quantized layers into a graph.

A Conv in the ``onnxruntime`` format has DequantizeLinear at all inputs and QuantizeLinear at its
output, from which ONNX Runtime builds a QLinearConv:

    x ─► QuantizeLinear ─► DequantizeLinear ─┐
              w (int8) ─► DequantizeLinear ─ Conv ─► QuantizeLinear ─► DequantizeLinear ─► y
             b (int32) ─► DequantizeLinear ──┘

A linear layer becomes a single node, which takes the bias too:

    x ─► MatMul(w) ─► Add(b) ─► y

    x ─► QuantizeLinear ─► MatMulIntegerToFloat(w int8, scales, b) ─► y

In the ``qdq`` format both keep their operator, and biases stay in float.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import GraphLayer, add_constant, constant, module
from latentforge.optimize.quantize.nodes import add_copy, add_node, replace
from latentforge.optimize.quantize.options import QuantFormat
from latentforge.optimize.quantize.ranges import Grid

__all__ = ["Int8Writer", "PlannedLayer", "is_plain", "round_weight", "take_bias"]

Array = NDArray[Any]

_MAX_BIAS = 2.0**30  # half of what an int32 holds: the sum of products is added to it


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """Layer to quantize.

    Attributes:
        layer: the layer, or one of the parts that it was split into.
        name: name of the original layer.
        input: grid of its input.
        output: grid of its output, if the format needs one.
    """

    layer: GraphLayer
    name: str
    input: Grid
    output: Grid | None


def round_weight(
    array: Array, axis: int, limit: int, *, min_scale: Array | float = 0.0
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a weight to symmetric 8-bit integers with one scale per channel.

    Args:
        array: the weight.
        axis: axis of the channels.
        limit: largest integer to use.
        min_scale: lower bound of the scales, for all channels or (channels,).

    Returns:
        The integers and the (channels,) scales; their product approximates the weight.
    """
    reduced = tuple(index for index in range(array.ndim) if index != axis)
    scale = np.maximum(np.abs(array).max(axis=reduced) / limit, min_scale).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1.0
    shape = [1] * array.ndim
    shape[axis] = -1
    integers = np.clip(np.rint(array / scale.reshape(shape)), -limit, limit)
    return integers.astype(np.int8), scale


class Int8Writer:
    """Writer of quantized layers; layers that read the same activation share its quantization."""

    def __init__(self, graph: ir.Graph, *, limit: int, form: QuantFormat) -> None:
        self._graph = graph
        self._limit = limit
        self._form = form
        self._grids: dict[Grid, tuple[ir.Value, ir.Value]] = {}
        self._quantized_values: dict[tuple[ir.Value, Grid], ir.Value] = {}

    def write(self, planned: PlannedLayer) -> None:
        """Replace a layer by nodes that compute in 8 bits."""
        node, old = planned.layer.node, planned.layer.weight
        fused = planned.layer.linear and self._form == "onnxruntime"
        replace(*(self._product(planned) if fused else self._operator(planned)))
        if node.graph is not None:  # the new node has the bias, so replace() removed its Add
            self._graph.remove(node, safe=True)
        if not old.uses():  # the float weights of a large model would take gigabytes until the end
            self._graph.initializers.pop(str(old.name))

    def rounded(self, value: ir.Value, grid: Grid, before: ir.Node, scope: str) -> ir.Value:
        """Quantize and dequantize an activation: return it rounded to its grid, in float."""
        scale, zero = self._grid(grid)
        inputs = [self._quantized(value, grid, before, scope), scale, zero]
        return add_node(before, "DequantizeLinear", inputs, name=scope, like=value)

    def weight(self, planned: PlannedLayer) -> ir.Value:
        """Store a layer's weight in 8 bits, and return it dequantized."""
        integers, scale = round_weight(planned.layer.array, planned.layer.out_axis, self._limit)
        return self._stored(planned, planned.layer.weight, integers, scale, planned.layer.out_axis)

    def _operator(self, planned: PlannedLayer) -> tuple[ir.Value, ir.Value]:
        """Return a layer's output, and that of the same operator on dequantized inputs."""
        layer, node, scope = planned.layer, planned.layer.node, module(planned.name)
        x = self.rounded(layer.input, planned.input, node, scope)
        weight, bias = self.weight(planned), list(node.inputs[2:])
        if planned.output is not None and bias:
            weight, bias = self._with_integer_bias(planned)
        y = add_copy(node, [x, weight, *bias])
        if planned.output is not None:
            y = self.rounded(y, planned.output, node, scope)
        return layer.output, y

    def _with_integer_bias(self, planned: PlannedLayer) -> tuple[ir.Value, list[ir.Value | None]]:
        """Return weight and bias for a QLinearConv.

        The scale of an int32 bias is the product of the scales of input and weight, so the scales
        of the weights have a lower bound that keeps the bias in range.
        """
        layer, source = planned.layer, planned.layer.node.inputs[2]
        array, step = constant(source), np.float32(planned.input.scale)
        assert source is not None and array is not None
        bias = np.asarray(array, np.float32)
        bound = np.abs(bias) / (_MAX_BIAS * step)
        integers, scale = round_weight(layer.array, layer.out_axis, self._limit, min_scale=bound)
        total = scale * step
        weight = self._stored(planned, layer.weight, integers, scale, layer.out_axis)
        sums = np.rint(bias / total).astype(np.int32)
        return weight, [self._stored(planned, source, sums, total, 0)]

    def _product(self, planned: PlannedLayer) -> tuple[ir.Value, ir.Value]:
        """Return the output of a linear layer and its bias, and that of MatMulIntegerToFloat."""
        layer, scope = planned.layer, module(planned.name)
        array = layer.array.T if layer.out_axis == 0 else layer.array
        integers, scale = round_weight(array, 1, self._limit)
        weight = add_constant(self._graph, integers, f"{layer.weight.name}.int8")
        scales = add_constant(self._graph, scale, f"{layer.weight.name}.scale")
        old, bias = take_bias(layer)
        x = self._quantized(layer.input, planned.input, layer.node, scope)
        step, zero = self._grid(planned.input)
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
        self, planned: PlannedLayer, source: ir.Value, integers: Array, scale: Array, axis: int
    ) -> ir.Value:
        """Store integers and scales as initializers, and return them dequantized."""
        stored = add_constant(self._graph, integers, f"{source.name}.{integers.dtype}")
        scales = add_constant(self._graph, scale, f"{source.name}.scale")
        name, node = module(planned.name), planned.layer.node
        inputs = [stored, scales]
        return add_node(node, "DequantizeLinear", inputs, name=name, like=source, axis=axis)

    def _quantized(self, value: ir.Value, grid: Grid, before: ir.Node, scope: str) -> ir.Value:
        if (value, grid) not in self._quantized_values:
            scale, zero = self._grid(grid)
            inputs = [value, scale, zero]
            self._quantized_values[value, grid] = add_node(
                before, "QuantizeLinear", inputs, name=scope, like=value, dtype=zero.dtype
            )
        return self._quantized_values[value, grid]

    def _grid(self, grid: Grid) -> tuple[ir.Value, ir.Value]:
        """Return the scale and the zero point of a grid as initializers."""
        if grid not in self._grids:
            zero = np.asarray(grid.zero_point, np.int8 if self._form == "qdq" else np.uint8)
            scale = add_constant(self._graph, np.asarray(grid.scale, np.float32), "step")
            self._grids[grid] = scale, add_constant(self._graph, zero, "zero")
        return self._grids[grid]


def take_bias(layer: GraphLayer) -> tuple[ir.Value, ir.Value | None]:
    """Return the output of a linear layer with its bias, and the bias; None if it has none.

    The bias is an input of a Gemm, or that of an Add which alone reads the product:

        MatMul(w) ─► Add(b) ─► y        returns y, b
        Gemm(w, b) ─► y                 returns y, b
        MatMul(w) ─► y                  returns y, None
    """
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


def is_plain(layer: GraphLayer) -> bool:
    """Return True unless the layer is a Gemm with factors, or with a bias that varies by row."""
    node = layer.node
    if node.op_type != "Gemm":
        return True
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    bias_per_output = len(node.inputs) < 3 or (
        bias is not None
        and bias.shape == (layer.weight.shape or ())[layer.out_axis : layer.out_axis + 1]
    )
    return bias_per_output and all(
        node.attributes.get_float(name, 1.0) == 1 for name in ("alpha", "beta")
    )
