"""int8 quantization of a graph: choose layers, calibrate their activations, write 8-bit nodes.

A layer before and after, in the ``qdq`` format (write.py has the one of ``onnxruntime``):

    x ─► Conv(w, b) ─► y

    x ─► QuantizeLinear ─► DequantizeLinear ─► Conv ─► y
                  w (int8) ─► DequantizeLinear ──┘ └── b (float)
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from latentforge.optimize.graph import GraphLayer, dependencies, layers, matches, tidy
from latentforge.optimize.quantize.calibration import (
    ActivationRange,
    collect_channel_maxima,
    collect_ranges,
)
from latentforge.optimize.quantize.concat import concat_channels, magnitudes_differ, split_conv
from latentforge.optimize.quantize.nodes import check_float
from latentforge.optimize.quantize.options import Int8Settings, QuantFormat
from latentforge.optimize.quantize.ranges import choose_grid
from latentforge.optimize.quantize.smooth import smooth
from latentforge.optimize.quantize.weights import quantize_per_channel
from latentforge.optimize.quantize.write import Int8Writer, PlannedLayer, is_plain
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.tensor import Feeds

__all__ = ["plan_layers", "quantize"]


def quantize(
    model: ir.Model,
    feeds: Sequence[Feeds],
    settings: Int8Settings,
    form: QuantFormat = "onnxruntime",
) -> Counter[str]:
    """Quantize the weights and the input activations of layers to 8 bits.

    Weights have one scale per output channel and zero point 0, activations have one scale. Layers
    are every Conv, MatMul and Gemm with constant weights that depends on the graph's ``sample``,
    except those that the settings exclude. Layers that depend on the prompt or the timestep alone
    get 8-bit weights only: they take little time, and run once per image in a partitioned graph.

    Args:
        model: float graph, changed in place.
        feeds: its inputs, recorded from denoising runs over all steps of the schedule in use.
        settings: layers to exclude, and the methods of calibration.
        form: representation of quantized layers.

    Returns:
        Numbers of layers: ``convs`` and ``linears`` in 8 bits, ``weights`` with 8-bit weights
        alone, ``kept`` in float although they could be quantized, ``smoothed`` and ``split``.

    Raises:
        SettingsError: the graph is quantized already, or feeds is empty.
    """
    planned, counts = plan_layers(model, feeds, settings, form)
    writer = Int8Writer(model.graph, limit=settings.weight_limit, form=form)
    for layer in planned:
        writer.write(layer)
    for independent in _sample_independent(model.graph, settings):
        quantize_per_channel(model.graph, independent)
        counts["weights"] += 1
    tidy(model)
    return counts


def plan_layers(
    model: ir.Model, feeds: Sequence[Feeds], settings: Int8Settings, form: QuantFormat
) -> tuple[list[PlannedLayer], Counter[str]]:
    """Choose the layers to quantize and the grids of their activations.

    SmoothQuant and split concatenations change the graph, but not what it computes.
    """
    check_float(model)
    if not feeds:
        raise SettingsError("no calibration inputs: record at least one run of the component")
    chosen, excluded = _choose(model.graph, settings)
    counts = Counter(kept=excluded, convs=0, linears=0, smoothed=0, split=0)
    counts.update("linears" if layer.linear else "convs" for layer in chosen)
    names = _prepare(model, chosen, feeds, settings, counts)
    outputs = [layer.output for layer in names if form == "onnxruntime" and not layer.linear]
    values = dict.fromkeys([*(layer.input for layer in names), *outputs])
    ranges = collect_ranges(model, values, feeds, histogram=settings.ranges != "minmax")
    planned = [_planned(layer, name, ranges, settings, form) for layer, name in names.items()]
    return planned, counts


def _choose(graph: ir.Graph, settings: Int8Settings) -> tuple[list[GraphLayer], int]:
    """Return the layers to quantize, and the number of those that are excluded."""
    dependent = _sample_dependent(graph)
    possible = [x for x in _float_layers(graph) if x.input in dependent and is_plain(x)]
    chosen = [layer for layer in possible if not matches(layer.name, settings.exclude)]
    return chosen, len(possible) - len(chosen)


def _sample_independent(graph: ir.Graph, settings: Int8Settings) -> list[GraphLayer]:
    """Return the layers that do not depend on the sample, except those that are excluded."""
    dependent = _sample_dependent(graph)
    return [
        layer
        for layer in _float_layers(graph)
        if layer.input not in dependent and not matches(layer.name, settings.exclude)
    ]


def _float_layers(graph: ir.Graph) -> list[GraphLayer]:
    return [layer for layer in layers(graph) if layer.weight.dtype == ir.DataType.FLOAT]


def _sample_dependent(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that depend on the input ``sample``; all values if there is none."""
    names = {"sample"} & {str(value.name) for value in graph.inputs}
    return {value for value, inputs in dependencies(graph).items() if inputs >= names}


def _prepare(
    model: ir.Model,
    chosen: Sequence[GraphLayer],
    feeds: Sequence[Feeds],
    settings: Int8Settings,
    counts: Counter[str],
) -> dict[GraphLayer, str]:
    """Smooth linear layers and split convolutions.

    Returns:
        The layers to quantize afterwards, with the name of the layer that each is a part of.
    """
    alpha, ratio = settings.smoothquant_alpha, settings.split_concat
    linears = [layer for layer in chosen if layer.linear and alpha]
    concats = {layer: sizes for layer in chosen if ratio and (sizes := concat_channels(layer))}
    views = {layer.input: _channel_view(layer) for layer in (*linears, *concats)}
    maxima = collect_channel_maxima(model, views, feeds) if views else {}
    counts["smoothed"] = smooth(
        model.graph, linears, maxima, alpha, insert_mul=settings.smoothquant_insert_mul
    )
    names: dict[GraphLayer, str] = {}
    for layer in chosen:
        nodes = [layer.node]
        if layer in concats and magnitudes_differ(maxima[layer.input], concats[layer], ratio):
            nodes = split_conv(model.graph, layer, concats[layer])
            counts["split"] += 1
        for node in nodes:  # new records, since a GraphLayer caches the weight that it had
            part = GraphLayer(node=node, out_axis=layer.out_axis, in_axis=layer.in_axis)
            names[part] = layer.name
    return names


def _channel_view(layer: GraphLayer) -> tuple[int, ...]:
    """Return the shape for Reshape that makes the channels of a layer's input axis 1."""
    return (-1, layer.array.shape[layer.in_axis]) if layer.linear else (0, 0, -1)


def _planned(
    layer: GraphLayer,
    name: str,
    ranges: Mapping[ir.Value, ActivationRange],
    settings: Int8Settings,
    form: QuantFormat,
) -> PlannedLayer:
    signed = form == "qdq"
    output = None if signed or layer.linear else ranges[layer.output]
    return PlannedLayer(
        layer=layer,
        name=name,
        input=choose_grid(ranges[layer.input], settings, signed=signed),
        output=None if output is None else choose_grid(output, settings, signed=signed),
    )
