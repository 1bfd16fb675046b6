"""Weights in few bits and everything else in float: smaller files, not less time."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import Layer, constant, layers
from latentforge.optimize.quantize.build import (
    add_constant,
    add_node,
    check_float,
    module,
    replace,
    tidy,
)
from latentforge.optimize.quantize.settings import Form, WeightOnly, matches
from latentforge.optimize.quantize.write import plain, round_weight, take_bias
from latentforge.runtime.errors import SettingsError

__all__ = ["quantize_weights", "store_in_channels"]

Array = NDArray[Any]

_BLOCKS_SINCE = 21  # the opset from which DequantizeLinear knows blocks and 4-bit integers

_INTS_OF_4_SINCE = 10  # the version of ONNX's file format


def quantize_weights(model: ir.Model, settings: WeightOnly, form: Form = "onnxruntime") -> int:
    """Store weights in few bits, symmetric, and compute in float.

    Conv weights and embedding tables get 8 bits and a scale an output channel; so do linear layers'
    without blocks. A table's scales are by column, so that they apply after the rows are picked.
    With blocks, linear layers become MatMulNBits for ``onnxruntime`` and a DequantizeLinear of
    blocks for ``qdq``, which raises the graph's opset to 21.

    ONNX Runtime's CPU keeps the integers and makes floats of them in every run. Stable Diffusion
    1.5's UNet, two latents of 64x64 on two cores, from float to 8 bits: a file of 3.4 to 0.9 GB,
    6.5 to 2.0 s to load, a peak of 6.8 to 4.5 GB, and 20 to 26 s a run.

    Args:
        model: a float graph, changed in place.
        settings: how many bits, and which layers are left alone.
        form: which runtime is to take it.

    Returns:
        How many weights are stored in few bits now.

    Raises:
        SettingsError: the graph is quantized already.
    """
    check_float(model)
    chosen = [layer for layer in layers(model.graph) if not matches(layer.name, settings.keep)]
    for layer in chosen:
        if layer.linear and settings.block and plain(layer):
            _in_blocks(model, layer, settings, form)
        else:
            store_in_channels(model.graph, layer)
    tables = [node for node in model.graph if _is_table(node)]
    tables = [node for node in tables if not matches(str(node.name), settings.keep)]
    for node in tables:
        _in_columns(model.graph, node)
    tidy(model)
    return len(chosen) + len(tables)


def store_in_channels(graph: ir.Graph, layer: Layer) -> None:
    """A weight from int8 with a scale an output channel."""
    integers, scale = round_weight(layer.array, layer.out_axis, 127)
    name, weight = module(layer.name), layer.weight
    inputs = [
        add_constant(graph, integers, f"{weight.name}.int8"),
        add_constant(graph, scale.astype(_numpy(weight)), f"{weight.name}.scale"),
    ]
    kind, axis = "DequantizeLinear", layer.out_axis
    layer.node.replace_input_with(
        1, add_node(layer.node, kind, inputs, name=name, like=weight, axis=axis)
    )


def _in_columns(graph: ir.Graph, node: ir.Node) -> None:
    """A table from int8 with a scale a column, applied to the rows that are picked."""
    table, rows, name = node.inputs[0], node.inputs[1], module(str(node.name))
    array = constant(table)
    assert table is not None and array is not None
    integers, scale = round_weight(np.asarray(array, np.float32), 1, 127)
    stored = add_constant(graph, integers, f"{table.name}.int8")
    scales = add_constant(graph, scale.astype(_numpy(table)), f"{table.name}.scale")
    old, kind = node.outputs[0], ir.DataType.INT8
    picked = add_node(node, "Gather", [stored, rows], name=name, like=old, dtype=kind)
    inputs = [picked, scales]
    replace(old, add_node(node, "DequantizeLinear", inputs, name=name, like=old, axis=-1))


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


def _in_blocks(model: ir.Model, layer: Layer, settings: WeightOnly, form: Form) -> None:
    """A weight in few bits with a scale for every few inputs of an output."""
    graph = model.graph
    array = layer.array.T if layer.in_axis == 0 else layer.array  # (outputs, inputs)
    integers, scale = _round_blocks(array, settings)
    if form == "onnxruntime":
        _by_bits(graph, layer, integers, scale, settings)
        return
    _raise_opset(model)
    if layer.in_axis == 0:
        integers, scale = integers.T, scale.T
    kind = ml_dtypes.int4 if settings.bits == 4 else np.int8
    weight = layer.weight
    inputs = [
        add_constant(graph, integers.astype(kind), f"{weight.name}.int{settings.bits}"),
        add_constant(graph, scale.astype(_numpy(weight)), f"{weight.name}.scale"),
    ]
    floats = add_node(
        layer.node,
        "DequantizeLinear",
        inputs,
        name=module(layer.name),
        like=weight,
        axis=layer.in_axis,
        block_size=settings.block,
    )
    layer.node.replace_input_with(1, floats)


def _round_blocks(array: Array, settings: WeightOnly) -> tuple[NDArray[np.int8], Array]:
    """(outputs, inputs) in few bits, and (outputs, blocks) scales; the last block may be short."""
    outputs, inputs = array.shape
    blocks, limit = -(-inputs // settings.block), 2 ** (settings.bits - 1) - 1
    padded = np.zeros((outputs * blocks, settings.block), np.float32)
    padded.reshape(outputs, -1)[:, :inputs] = array
    integers, scale = round_weight(padded, 0, limit)
    return integers.reshape(outputs, -1)[:, :inputs], scale.reshape(outputs, blocks)


def _by_bits(
    graph: ir.Graph, layer: Layer, integers: Array, scale: Array, settings: WeightOnly
) -> None:
    """Replace a layer and the Add of its bias by com.microsoft's MatMulNBits."""
    outputs, inputs = integers.shape
    blocks, weight = scale.shape[1], layer.weight
    packed = _packed(integers, blocks * settings.block, settings.bits)
    stored = packed.reshape(outputs, blocks, settings.block * settings.bits // 8)
    name = f"{weight.name}.int{settings.bits}"
    old, bias = take_bias(layer)
    operands = [
        layer.input,
        add_constant(graph, stored, name),
        add_constant(graph, scale.astype(_numpy(weight)), f"{weight.name}.scale"),
        *(None, None, bias),
    ]
    attributes = {"K": inputs, "N": outputs, "bits": settings.bits, "block_size": settings.block}
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


def _numpy(value: ir.Value) -> Any:
    """The numpy dtype of a float value."""
    assert value.dtype is not None
    return value.dtype.numpy()
