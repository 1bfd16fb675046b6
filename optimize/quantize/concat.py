"""Split convolutions over the concatenation with a skip connection, with one range per part.

Li et al. (2023), "Q-Diffusion", arXiv 2302.04304, section 4.2: the two halves of the concatenation
in a UNet's up blocks differ in magnitude, and a range that covers both leaves few steps to the
smaller one. A convolution is linear in its input channels, so it may be split in two:

    before    h ────┬─► Concat ─► norm ─► SiLU ─► Conv(w) ─► y
              skip ─┘

    after     h ────┬─► Concat ─► norm ─► SiLU ─► Split ─┬─► Conv(w[:, :c]) ─┬─► Add ─► y
              skip ─┘                                    └─► Conv(w[:, c:]) ─┘

where c is the number of channels of h. The input of each new convolution has its own range.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import GraphLayer, add_constant, module
from latentforge.optimize.quantize.nodes import add_copy, add_node, replace

__all__ = ["concat_channels", "magnitudes_differ", "split_conv"]

Array = NDArray[Any]

_CHANNEL_PRESERVING = (
    "Reshape",
    "InstanceNormalization",
    "GroupNormalization",
    "GroupNorm",
    "Sigmoid",
    "QuickGelu",
    "Swish",
)
"""Operators whose output has the channels of their first input."""


def concat_channels(layer: GraphLayer) -> tuple[int, ...]:
    """Return the channels of each concatenated tensor that a Conv reads, also through a norm.

    Returns:
        An empty tuple for other layers, and where a number of channels is unknown.
    """
    if layer.linear or layer.node.attributes.get_int("group", 1) != 1:
        return ()
    node = _source(layer.input)
    if node is None or node.op_type != "Concat" or node.attributes.get_int("axis") != 1:
        return ()
    sizes = [
        None if value is None or value.shape is None else value.shape[1] for value in node.inputs
    ]
    fixed = tuple(size for size in sizes if isinstance(size, int))
    channels = (layer.weight.shape or ())[1:2]
    return fixed if len(fixed) == len(sizes) and list(channels) == [sum(fixed)] else ()


def _source(value: ir.Value) -> ir.Node | None:
    """Return the node that an activation comes from, behind elementwise operators and norms."""
    node = value.producer()
    if node is None or node.op_type not in (*_CHANNEL_PRESERVING, "Mul", "Add"):
        return node
    inputs = node.inputs[:1] if node.op_type in _CHANNEL_PRESERVING else node.inputs
    sources = {
        _source(operand)
        for operand in inputs
        if operand is not None and not operand.is_initializer() and not _is_constant(operand)
    }
    return sources.pop() if len(sources) == 1 else None


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"


def magnitudes_differ(maxima: Array, sizes: tuple[int, ...], ratio: float) -> bool:
    """Return True if the largest magnitudes of two parts differ by more than a ratio.

    Args:
        maxima: (channels,) largest magnitude of each channel.
        sizes: number of channels of each part.
        ratio: the ratio.
    """
    ends = np.cumsum((0, *sizes))
    part_maxima = [float(maxima[start:stop].max()) for start, stop in pairwise(ends)]
    return len(sizes) > 1 and max(part_maxima) > ratio * min(part_maxima)


def split_conv(graph: ir.Graph, layer: GraphLayer, sizes: tuple[int, ...]) -> list[ir.Node]:
    """Replace a Conv by the sum of one Conv per part of its input channels.

    Returns:
        The convolutions; the first has the bias and the name of the one that it replaces.
    """
    node, name = layer.node, module(layer.name)
    lengths = add_constant(graph, np.array(sizes, np.int64), f"{layer.weight.name}.parts")
    first = add_node(node, "Split", [layer.input, lengths], name=name, outputs=len(sizes), axis=1)
    split = first.producer()
    assert split is not None
    outputs = list(_convolutions(graph, layer, split.outputs, sizes))
    total = outputs[0]
    for output in outputs[1:]:
        total = add_node(node, "Add", [total, output], name=name, like=layer.output)
    replace(layer.output, total)
    return [conv for output in outputs if (conv := output.producer()) is not None]


def _convolutions(
    graph: ir.Graph, layer: GraphLayer, parts: Sequence[ir.Value], sizes: tuple[int, ...]
) -> Iterator[ir.Value]:
    node, array, ends = layer.node, layer.array, np.cumsum((0, *sizes))
    bias = list(node.inputs[2:3])
    for part, (start, stop) in zip(parts, pairwise(ends), strict=True):
        part.type, part.shape = layer.input.type, _resized(layer.input.shape, int(stop - start))
        weight = add_constant(graph, array[:, start:stop], f"{layer.weight.name}.part")
        name = layer.name if start == 0 else f"{layer.name}_{start}"
        yield add_copy(node, [part, weight, *bias], name)
        bias = []


def _resized(shape: ir.Shape | None, channels: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([shape[0], channels, *list(shape)[2:]])
