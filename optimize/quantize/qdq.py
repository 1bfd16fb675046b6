"""8-bit weights and activations: which layers, on which grids, and how they are written."""

from collections import Counter
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from latentforge.optimize.graph import GraphLayer, dependencies, layers, matches, tidy
from latentforge.optimize.quantize.concat import differ, parts, split
from latentforge.optimize.quantize.nodes import check_float
from latentforge.optimize.quantize.options import Form, Int8
from latentforge.optimize.quantize.ranges import Spread, channel_peaks, grid, spreads
from latentforge.optimize.quantize.smooth import smooth
from latentforge.optimize.quantize.weights import store_in_channels
from latentforge.optimize.quantize.write import Planned, Writer, plain
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.tensor import Feeds

__all__ = ["plan", "quantize"]


def quantize(
    model: ir.Model, feeds: Sequence[Feeds], settings: Int8, form: Form = "onnxruntime"
) -> Counter[str]:
    """Quantize the weights and the inputs of layers to 8 bits.

    Weights have a scale an output channel and zero point 0, activations one scale. Layers are
    every Conv, MatMul and Gemm with constant weights that depends on the graph's ``sample``, save
    those that the settings keep. Where only the prompt or the timestep matters, weights alone are
    in 8 bits: that is little work, and done once an image where the graph is cut.

    Args:
        model: a float graph, changed in place.
        feeds: its inputs, recorded from denoising runs over all steps of the schedule in use.
        settings: which layers, and which ranges.
        form: which runtime is to take it.

    Returns:
        How many layers are ``convs`` and ``linears`` in 8 bits now, have 8 bits in ``weights``
        alone, are ``kept`` in float though they could be quantized, ``smoothed`` and ``split``.

    Raises:
        SettingsError: the graph is quantized already, or there are no feeds.
    """
    planned, counts = plan(model, feeds, settings, form)
    writer = Writer(model.graph, limit=settings.weight_limit(form), form=form)
    for each in planned:
        writer.write(each)
    for layer in _beside(model.graph, settings):
        store_in_channels(model.graph, layer)
        counts["weights"] += 1
    tidy(model)
    return counts


def plan(
    model: ir.Model, feeds: Sequence[Feeds], settings: Int8, form: Form
) -> tuple[list[Planned], Counter[str]]:
    """Choose layers and grids, and smooth and split what the settings say.

    The graph changes, and computes what it did.
    """
    check_float(model)
    if not feeds:
        raise SettingsError("no calibration inputs: record at least one run of the component")
    chosen, kept = _choose(model.graph, settings)
    counts = Counter(kept=kept, convs=0, linears=0, smoothed=0, split=0)
    counts.update("linears" if layer.linear else "convs" for layer in chosen)
    names = _prepare(model, chosen, feeds, settings, counts)
    outputs = [layer.output for layer in names if form == "onnxruntime" and not layer.linear]
    values = dict.fromkeys([*(layer.input for layer in names), *outputs])
    seen = spreads(model, values, feeds, count=settings.ranges != "minmax")
    planned = [_planned(layer, name, seen, settings, form) for layer, name in names.items()]
    return planned, counts


def _choose(graph: ir.Graph, settings: Int8) -> tuple[list[GraphLayer], int]:
    """The layers to quantize, and how many more there are that could be."""
    reached = _reached(graph)
    possible = [layer for layer in _floats(graph) if layer.input in reached and plain(layer)]
    chosen = [layer for layer in possible if not matches(layer.name, settings.keep)]
    return chosen, len(possible) - len(chosen)


def _beside(graph: ir.Graph, settings: Int8) -> list[GraphLayer]:
    """The layers that the sample does not reach, save those to keep."""
    reached = _reached(graph)
    return [
        layer
        for layer in _floats(graph)
        if layer.input not in reached and not matches(layer.name, settings.keep)
    ]


def _floats(graph: ir.Graph) -> list[GraphLayer]:
    return [layer for layer in layers(graph) if layer.weight.dtype == ir.DataType.FLOAT]


def _reached(graph: ir.Graph) -> set[ir.Value]:
    """What depends on the sample, or on anything where a graph has no input of that name."""
    names = {"sample"} & {str(value.name) for value in graph.inputs}
    depends = dependencies(graph)
    return {value for value, inputs in depends.items() if inputs >= names}


def _prepare(
    model: ir.Model,
    chosen: Sequence[GraphLayer],
    feeds: Sequence[Feeds],
    settings: Int8,
    counts: Counter[str],
) -> dict[GraphLayer, str]:
    """Smooth linear layers and split convolutions; the layers that then are, and their names."""
    linears = [layer for layer in chosen if layer.linear and settings.smooth]
    joined = {layer: sizes for layer in chosen if settings.split_concat and (sizes := parts(layer))}
    views = {layer.input: _view(layer) for layer in (*linears, *joined)}
    peaks = channel_peaks(model, views, feeds) if views else {}
    counts["smoothed"] = smooth(
        model.graph, linears, peaks, settings.smooth, everywhere=settings.smooth_everywhere
    )
    named: dict[GraphLayer, str] = {}
    for layer in chosen:
        nodes = [layer.node]
        if layer in joined and differ(peaks[layer.input], joined[layer], settings.split_concat):
            nodes = split(model.graph, layer, joined[layer])
            counts["split"] += 1
        for node in nodes:  # anew: a layer remembers the weight that it had
            named[GraphLayer(node=node, out_axis=layer.out_axis, in_axis=layer.in_axis)] = (
                layer.name
            )
    return named


def _view(layer: GraphLayer) -> tuple[int, ...]:
    """What Reshape makes of a layer's input, so that its channels are axis 1."""
    return (-1, layer.array.shape[layer.in_axis]) if layer.linear else (0, 0, -1)


def _planned(
    layer: GraphLayer, name: str, seen: Mapping[ir.Value, Spread], settings: Int8, form: Form
) -> Planned:
    signed = form == "qdq"
    output = None if signed or layer.linear else seen[layer.output]
    return Planned(
        layer=layer,
        name=name,
        input=grid(seen[layer.input], settings, signed=signed),
        output=None if output is None else grid(output, settings, signed=signed),
    )
