"""Convolutions over the concatenation with a skip, whose parts have ranges of their own.

Li et al. (2023), "Q-Diffusion", arXiv 2302.04304, section 4.2.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import GraphLayer, add_constant, module
from latentforge.optimize.quantize.nodes import add_node, add_variant, replace

__all__ = ["differ", "parts", "split"]

Array = NDArray[Any]

_THROUGH = (
    "Reshape",
    "InstanceNormalization",
    "GroupNormalization",
    "GroupNorm",
    "Sigmoid",
    "QuickGelu",
    "Swish",
)
"""Nodes whose first input's channels are the output's."""


def parts(layer: GraphLayer) -> tuple[int, ...]:
    """The channels of each part of the concatenation that a Conv reads, also through a norm."""
    if layer.linear or layer.node.attributes.get_int("group", 1) != 1:
        return ()
    node = _source(layer.input)
    if node is None or node.op_type != "Concat" or node.attributes.get_int("axis") != 1:
        return ()
    sizes = [
        None if value is None or value.shape is None else value.shape[1] for value in node.inputs
    ]
    known = tuple(size for size in sizes if isinstance(size, int))
    channels = (layer.weight.shape or ())[1:2]
    return known if len(known) == len(sizes) and list(channels) == [sum(known)] else ()


def _source(value: ir.Value) -> ir.Node | None:
    """The node that an activation comes from through elementwise ones and group norms."""
    node = value.producer()
    if node is None or node.op_type not in (*_THROUGH, "Mul", "Add"):
        return node
    inputs = node.inputs[:1] if node.op_type in _THROUGH else node.inputs
    found = {
        _source(each)
        for each in inputs
        if each is not None and not each.is_initializer() and not _constant(each)
    }
    return found.pop() if len(found) == 1 else None


def _constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"


def differ(peaks: Array, sizes: tuple[int, ...], ratio: float) -> bool:
    """Whether the largest magnitudes of some parts differ by more than a ratio."""
    ends = np.cumsum((0, *sizes))
    tops = [float(peaks[start:stop].max()) for start, stop in pairwise(ends)]
    return len(sizes) > 1 and max(tops) > ratio * min(tops)


def split(graph: ir.Graph, layer: GraphLayer, sizes: tuple[int, ...]) -> list[ir.Node]:
    """Replace a Conv by one for each part of its input's channels, and the sum of them.

    Returns:
        The convolutions; the first has the bias and the name of the one replaced.
    """
    node, name = layer.node, module(layer.name)
    lengths = add_constant(graph, np.array(sizes, np.int64), f"{layer.weight.name}.parts")
    first = add_node(node, "Split", [layer.input, lengths], name=name, outputs=len(sizes), axis=1)
    halves = first.producer()
    assert halves is not None
    made = list(_convolutions(graph, layer, halves.outputs, sizes))
    total = made[0]
    for part in made[1:]:
        total = add_node(node, "Add", [total, part], name=name, like=layer.output)
    replace(layer.output, total)
    return [each for part in made if (each := part.producer()) is not None]


def _convolutions(
    graph: ir.Graph, layer: GraphLayer, halves: Sequence[ir.Value], sizes: tuple[int, ...]
) -> Iterator[ir.Value]:
    node, array, ends = layer.node, layer.array, np.cumsum((0, *sizes))
    bias = list(node.inputs[2:3])
    for half, (start, stop) in zip(halves, pairwise(ends), strict=True):
        half.type, half.shape = layer.input.type, _resized(layer.input.shape, int(stop - start))
        weight = add_constant(graph, array[:, start:stop], f"{layer.weight.name}.part")
        name = layer.name if start == 0 else f"{layer.name}_{start}"
        yield add_variant(node, [half, weight, *bias], name)
        bias = []


def _resized(shape: ir.Shape | None, channels: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([shape[0], channels, *list(shape)[2:]])
