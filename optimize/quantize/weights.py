"""Weight-only quantization: 8-bit or 4-bit weights, arithmetic in float.

It makes files smaller, not runs faster. A weight is stored in one of three ways:

    per output channel           w (int8) ─► DequantizeLinear(axis) ─► Conv, MatMul, Gemm
    blocks, ``qdq``              w (int4) ─► DequantizeLinear(axis, block_size) ─► MatMul
    blocks, ``onnxruntime``      MatMul(w) ─► Add(b)  becomes  MatMulNBits(w, scales, b)
"""

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
from latentforge.optimize.quantize.options import QuantFormat, WeightOnlySettings
from latentforge.optimize.quantize.write import is_plain, round_weight, take_bias
from latentforge.runtime.errors import SettingsError

__all__ = ["quantize_per_channel", "quantize_weights"]

Array = NDArray[Any]

_BLOCKED_OPSET = 21  # the first in which DequantizeLinear has blocks and 4-bit integers

_INT4_IR_VERSION = 10  # the first version of ONNX's file format with 4-bit integers

_DEFAULT_BLOCK = {4: 32, 8: 0}  # by bits


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """Block quantization: ``size`` consecutive weights share a scale; 0: one per output channel."""

    bits: Literal[4, 8]
    size: int


def quantize_weights(
    model: ir.Model,
    settings: WeightOnlySettings,
    form: QuantFormat = "onnxruntime",
    *,
    bits: Literal[4, 8] = 8,
) -> int:
    """Store weights as symmetric 8-bit or 4-bit integers, and compute in float.

    Conv weights and embedding tables get 8 bits and one scale per output channel; so do linear
    layers without blocks. With blocks, linear layers become MatMulNBits in the ``onnxruntime``
    format, and have a DequantizeLinear of blocks in ``qdq``, which raises the graph's opset to 21.
    A weight whose size is no multiple of the block size has one scale per output channel in
    ``qdq``, since OpenVINO refuses short blocks. 4 bits need blocks.

    The scales of an embedding table are by column in the ``onnxruntime`` format, so that they apply
    after the Gather of rows. In ``qdq`` they are by row and apply before: TensorRT accepts integers
    only in front of their DequantizeLinear, and OpenVINO 2026.4 reads beyond the scales of columns
    there and corrupts the heap.

    ONNX Runtime's CPU provider keeps the integers and dequantizes them in every run. Stable
    Diffusion 1.5's UNet, two latents of 64x64 on two cores, goes from float to 8 bits: from 3.4 to
    0.9 GB of file, from 6.5 to 2.0 s of load time, from 6.8 to 4.5 GB of peak memory, and from 20
    to 26 s per run.

    Args:
        model: float graph, changed in place.
        settings: layers to exclude, and the block size.
        form: representation of quantized layers.
        bits: bits of linear layers' weights; 4 uses blocks of 32 unless the settings say otherwise.

    Returns:
        The number of weights that were quantized.

    Raises:
        SettingsError: the graph is quantized already, or cannot have the opset of blocks.
    """
    check_float(model)
    blocks = _Blocks(bits=bits, size=settings.block_size or _DEFAULT_BLOCK[bits])
    chosen = [layer for layer in layers(model.graph) if not matches(layer.name, settings.exclude)]
    for layer in chosen:
        if layer.linear and is_plain(layer) and _has_blocks(blocks, layer, form):
            _quantize_blocks(model, layer, blocks, form)
        else:
            quantize_per_channel(model.graph, layer)
    tables = [node for node in model.graph if _is_table(node)]
    tables = [node for node in tables if not matches(str(node.name), settings.exclude)]
    for node in tables:
        _quantize_table(model.graph, node, form)
    tidy(model)
    return len(chosen) + len(tables)


def _has_blocks(blocks: _Blocks, layer: GraphLayer, form: QuantFormat) -> bool:
    """Return True if a layer's weight is to be stored in blocks, and the format allows it."""
    if not blocks.size:
        return False
    return form == "onnxruntime" or layer.array.shape[layer.in_axis] % blocks.size == 0


def quantize_per_channel(graph: ir.Graph, layer: GraphLayer) -> None:
    """Store a layer's weight in int8 with one scale per output channel."""
    integers, scale = round_weight(layer.array, layer.out_axis, 127)
    name, weight = module(layer.name), layer.weight
    inputs = _stored(graph, weight, integers, scale)
    dequantized = add_node(
        layer.node, "DequantizeLinear", inputs, name=name, like=weight, axis=layer.out_axis
    )
    layer.node.replace_input_with(1, dequantized)


def _quantize_table(graph: ir.Graph, node: ir.Node, form: QuantFormat) -> None:
    """Store the embedding table of a Gather in int8.

    before:                 table (float) ─► Gather ─► y
    after, ``qdq``:         table (int8) ─► DequantizeLinear(rows) ─► Gather ─► y
    after, ``onnxruntime``: table (int8) ─► Gather ─► DequantizeLinear(columns) ─► y
    """
    table, rows, name = node.inputs[0], node.inputs[1], module(str(node.name))
    array, old, dequantize = constant(table), node.outputs[0], "DequantizeLinear"
    assert table is not None and array is not None
    axis = 0 if form == "qdq" else 1
    integers, scale = round_weight(np.asarray(array, np.float32), axis, 127)
    stored, scales = _stored(graph, table, integers, scale)
    if form == "qdq":
        floats = add_node(node, dequantize, [stored, scales], name=name, like=table, axis=axis)
        node.replace_input_with(0, floats)
        return
    gathered = add_node(node, "Gather", [stored, rows], name=name, like=old, dtype=ir.DataType.INT8)
    replace(old, add_node(node, dequantize, [gathered, scales], name=name, like=old, axis=-1))


def _is_table(node: ir.Node) -> bool:
    """Return True if a node gathers rows of a constant float matrix."""
    table = node.inputs[0] if node.op_type == "Gather" else None
    return (
        table is not None
        and table.is_initializer()
        and table.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        and len(table.shape or ()) == 2
        and node.attributes.get_int("axis", 0) == 0
    )


def _quantize_blocks(
    model: ir.Model, layer: GraphLayer, blocks: _Blocks, form: QuantFormat
) -> None:
    """Store a linear layer's weight with one scale per block of its input channels."""
    graph = model.graph
    array = layer.array.T if layer.in_axis == 0 else layer.array  # (outputs, inputs)
    integers, scale = _round_blocks(array, blocks)
    if form == "onnxruntime":
        _replace_by_matmul_nbits(graph, layer, integers, scale, blocks)
        return
    _raise_opset(model)
    if layer.in_axis == 0:
        integers, scale = integers.T, scale.T
    dtype = ml_dtypes.int4 if blocks.bits == 4 else np.int8
    weight = layer.weight
    inputs = _stored(graph, weight, integers.astype(dtype), scale, bits=blocks.bits)
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
    """Round an (outputs, inputs) weight in blocks, of which the last may be short.

    Returns:
        (outputs, inputs) integers and (outputs, blocks) scales.
    """
    outputs, inputs = array.shape
    count, limit = -(-inputs // blocks.size), 2 ** (blocks.bits - 1) - 1
    padded = np.zeros((outputs * count, blocks.size), np.float32)
    padded.reshape(outputs, -1)[:, :inputs] = array
    integers, scale = round_weight(padded, 0, limit)
    return integers.reshape(outputs, -1)[:, :inputs], scale.reshape(outputs, count)


def _replace_by_matmul_nbits(
    graph: ir.Graph, layer: GraphLayer, integers: Array, scale: Array, blocks: _Blocks
) -> None:
    """Replace a layer and the Add of its bias by com.microsoft.MatMulNBits."""
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
    """Pack rows as MatMulNBits expects them: padded, unsigned around 2^(bits - 1).

    Two 4-bit numbers share a byte, the first in the lower half.
    """
    zero_point = 2 ** (bits - 1)
    rows = np.full((len(integers), length), zero_point, np.uint8)
    rows[:, : integers.shape[1]] = integers.astype(np.int16) + zero_point
    return rows if bits == 8 else np.asarray(rows[:, ::2] | rows[:, 1::2] << 4, np.uint8)


def _raise_opset(model: ir.Model) -> None:
    """Raise the graph's opset to the first one in which DequantizeLinear has blocks."""
    if model.graph.opset_imports[""] >= _BLOCKED_OPSET:
        return
    if any(node.op_type == "GroupNormalization" for node in model.graph):
        raise SettingsError(
            "weight_only: blocks need opset 21, where GroupNormalization has another definition: "
            "use int8-weights with block_size 0"
        )
    model.graph.opset_imports[""] = _BLOCKED_OPSET
    model.ir_version = max(model.ir_version, _INT4_IR_VERSION)


def _stored(
    graph: ir.Graph, source: ir.Value, integers: Array, scale: Array, *, bits: int = 8
) -> tuple[ir.Value, ir.Value]:
    """Add integers and scales as initializers, the scales in the dtype of the float weight."""
    assert source.dtype is not None
    scale = scale.astype(source.dtype.numpy())
    stored = add_constant(graph, integers, f"{source.name}.int{bits}")
    return stored, add_constant(graph, scale, f"{source.name}.scale")
