"""Weights in few bits and everything else in float: smaller files, not less time."""

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import (
    GraphLayer,
    add_constant,
    constant,
    layers,
    matches,
    module,
    tidy,
)
from latentforge.optimize.quantize.nodes import add_node, check_float, replace
from latentforge.optimize.quantize.options import Form, WeightOnly
from latentforge.optimize.quantize.write import plain, round_weight, take_bias
from latentforge.runtime.errors import SettingsError

__all__ = ["quantize_weights", "store_in_channels"]

Array = NDArray[Any]

_BLOCKS_SINCE = 21  # the opset from which DequantizeLinear knows blocks and 4-bit integers

_INTS_OF_4_SINCE = 10  # the version of ONNX's file format

_BLOCK = {4: 32, 8: 0}  # by bits, how many weights share a scale unless settings say


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """Integers of so many bits, of which ``size`` in a row share a scale; 0 is no blocks."""

    bits: Literal[4, 8]
    size: int


def quantize_weights(
    model: ir.Model,
    settings: WeightOnly,
    form: Form = "onnxruntime",
    *,
    bits: Literal[4, 8] = 8,
) -> int:
    """Store weights in few bits, symmetric, and compute in float.

    Conv weights and embedding tables get 8 bits and a scale an output channel; so do linear layers'
    without blocks. A table's scales are by column, so that they apply after the rows are picked;
    for ``qdq`` they are by row and apply before, as TensorRT takes integers nowhere but in front of
    their DequantizeLinear, and OpenVINO 2026.4 reads beyond the scales of columns there and breaks
    the heap. With blocks, linear layers become MatMulNBits for ``onnxruntime`` and, for ``qdq``, a
    DequantizeLinear of blocks, which raises the graph's opset to 21. There a weight that blocks do
    not divide has a scale an output channel: OpenVINO refuses short blocks. 4 bits need blocks.

    ONNX Runtime's CPU keeps the integers and makes floats of them in every run. Stable Diffusion
    1.5's UNet, two latents of 64x64 on two cores, from float to 8 bits: a file of 3.4 to 0.9 GB,
    6.5 to 2.0 s to load, a peak of 6.8 to 4.5 GB, and 20 to 26 s a run.

    Args:
        model: a float graph, changed in place.
        settings: which layers are left alone, and how large blocks are.
        form: which runtime is to take it.
        bits: of linear layers' weights; with 4, blocks are of 32 unless the settings say.

    Returns:
        How many weights are stored in few bits now.

    Raises:
        SettingsError: the graph is quantized already.
    """
    check_float(model)
    blocks = _Blocks(bits=bits, size=settings.block or _BLOCK[bits])
    chosen = [layer for layer in layers(model.graph) if not matches(layer.name, settings.keep)]
    for layer in chosen:
        if layer.linear and plain(layer) and _fit(blocks, layer, form):
            _in_blocks(model, layer, blocks, form)
        else:
            store_in_channels(model.graph, layer)
    tables = [node for node in model.graph if _is_table(node)]
    tables = [node for node in tables if not matches(str(node.name), settings.keep)]
    for node in tables:
        _table(model.graph, node, form)
    tidy(model)
    return len(chosen) + len(tables)


def _fit(blocks: _Blocks, layer: GraphLayer, form: Form) -> bool:
    """Whether there are blocks, and a layer's weight can be stored in them."""
    if not blocks.size:
        return False
    return form == "onnxruntime" or layer.array.shape[layer.in_axis] % blocks.size == 0


def store_in_channels(graph: ir.Graph, layer: GraphLayer) -> None:
    """A weight from int8 with a scale an output channel."""
    integers, scale = round_weight(layer.array, layer.out_axis, 127)
    name, weight = module(layer.name), layer.weight
    inputs = _stored(graph, weight, integers, scale)
    kind, axis = "DequantizeLinear", layer.out_axis
    layer.node.replace_input_with(
        1, add_node(layer.node, kind, inputs, name=name, like=weight, axis=axis)
    )


def _table(graph: ir.Graph, node: ir.Node, form: Form) -> None:
    """Store the table that a node picks rows of in int8."""
    table, rows, name = node.inputs[0], node.inputs[1], module(str(node.name))
    array, old, kind = constant(table), node.outputs[0], "DequantizeLinear"
    assert table is not None and array is not None
    axis = 0 if form == "qdq" else 1
    integers, scale = round_weight(np.asarray(array, np.float32), axis, 127)
    stored, scales = _stored(graph, table, integers, scale)
    if form == "qdq":
        floats = add_node(node, kind, [stored, scales], name=name, like=table, axis=axis)
        node.replace_input_with(0, floats)
        return
    picked = add_node(node, "Gather", [stored, rows], name=name, like=old, dtype=ir.DataType.INT8)
    replace(old, add_node(node, kind, [picked, scales], name=name, like=old, axis=-1))


def _is_table(node: ir.Node) -> bool:
    """Whether a node picks rows of a constant matrix of floats."""
    table = node.inputs[0] if node.op_type == "Gather" else None
    return (
        table is not None
        and table.is_initializer()
        and table.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        and len(table.shape or ()) == 2
        and node.attributes.get_int("axis", 0) == 0
    )


def _in_blocks(model: ir.Model, layer: GraphLayer, blocks: _Blocks, form: Form) -> None:
    """A weight in few bits with a scale for every few inputs of an output."""
    graph = model.graph
    array = layer.array.T if layer.in_axis == 0 else layer.array  # (outputs, inputs)
    integers, scale = _round_blocks(array, blocks)
    if form == "onnxruntime":
        _by_bits(graph, layer, integers, scale, blocks)
        return
    _raise_opset(model)
    if layer.in_axis == 0:
        integers, scale = integers.T, scale.T
    kind = ml_dtypes.int4 if blocks.bits == 4 else np.int8
    weight = layer.weight
    inputs = _stored(graph, weight, integers.astype(kind), scale, bits=blocks.bits)
    floats = add_node(
        layer.node,
        "DequantizeLinear",
        inputs,
        name=module(layer.name),
        like=weight,
        axis=layer.in_axis,
        block_size=blocks.size,
    )
    layer.node.replace_input_with(1, floats)


def _round_blocks(array: Array, blocks: _Blocks) -> tuple[NDArray[np.int8], Array]:
    """(outputs, inputs) in few bits, and (outputs, blocks) scales; the last block may be short."""
    outputs, inputs = array.shape
    count, limit = -(-inputs // blocks.size), 2 ** (blocks.bits - 1) - 1
    padded = np.zeros((outputs * count, blocks.size), np.float32)
    padded.reshape(outputs, -1)[:, :inputs] = array
    integers, scale = round_weight(padded, 0, limit)
    return integers.reshape(outputs, -1)[:, :inputs], scale.reshape(outputs, count)


def _by_bits(
    graph: ir.Graph, layer: GraphLayer, integers: Array, scale: Array, blocks: _Blocks
) -> None:
    """Replace a layer and the Add of its bias by com.microsoft's MatMulNBits."""
    outputs, inputs = integers.shape
    count, bits = scale.shape[1], blocks.bits
    packed = _packed(integers, count * blocks.size, bits)
    packed = packed.reshape(outputs, count, blocks.size * bits // 8)
    stored = _stored(graph, layer.weight, packed, scale, bits=bits)
    old, bias = take_bias(layer)
    operands = [layer.input, *stored, None, None, bias]
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": blocks.size}
    new = add_node(
        layer.node,
        "MatMulNBits",
        operands,
        name=module(layer.name),
        like=old,
        domain="com.microsoft",
        node_name=layer.name,
        **attributes,
    )
    replace(old, new)
    graph.opset_imports.setdefault("com.microsoft", 1)


def _packed(integers: Array, length: int, bits: int) -> NDArray[np.uint8]:
    """Rows as unsigned numbers around 2^(bits - 1), padded to a length; two to a byte of 4 bits."""
    middle = 2 ** (bits - 1)
    rows = np.full((len(integers), length), middle, np.uint8)
    rows[:, : integers.shape[1]] = integers.astype(np.int16) + middle
    return rows if bits == 8 else np.asarray(rows[:, ::2] | rows[:, 1::2] << 4, np.uint8)


def _raise_opset(model: ir.Model) -> None:
    """Let DequantizeLinear have blocks."""
    if model.graph.opset_imports[""] >= _BLOCKS_SINCE:
        return
    if any(node.op_type == "GroupNormalization" for node in model.graph):
        raise SettingsError(
            "weights: blocks need opset 21, in which GroupNormalization is another operator; "
            "quantize without blocks"
        )
    model.graph.opset_imports[""] = _BLOCKS_SINCE
    model.ir_version = max(model.ir_version, _INTS_OF_4_SINCE)


def _stored(
    graph: ir.Graph, source: ir.Value, integers: Array, scale: Array, *, bits: int = 8
) -> tuple[ir.Value, ir.Value]:
    """Integers and their scales as initializers, the scales in the precision of the source."""
    assert source.dtype is not None
    scale = scale.astype(source.dtype.numpy())
    stored = add_constant(graph, integers, f"{source.name}.int{bits}")
    return stored, add_constant(graph, scale, f"{source.name}.scale")
