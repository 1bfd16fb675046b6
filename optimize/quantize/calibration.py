"""Calibration: collect the ranges of activations from recorded calls.

This is the entry of int8 calibration. The data passes through

    optimize/recording.py   record()           runs the source engines, keeps each call's inputs
    calibration.py          collect_ranges()   runs the graph on those inputs, measures activations
    ranges.py               choose_grid()      turns a range into scale and zero point
    qdq.py                  plan_layers()      does so for each layer, before write.py rewrites it

Recipes set the number of recorded prompts and calls in ``[calibration]`` and the method in
``int8.ranges``; a manifest names the runs in ``CalibratedFor``.

Activations are measured inside the graph, so that none of them is ever kept. A copy of the graph
gets nodes behind each activation, and more outputs:

    before                    after

    Conv ─► x ─► Silu         Conv ─► x ─┬─► Silu
                                         ├─► ReduceMin ─► x.min
                                         ├─► ReduceMax ─► x.max
                                         └─► Abs ─► Log ─► ... ─► ScatterElements ─► x.histogram
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import add_constant, open_session
from latentforge.runtime.tensor import Feeds

__all__ = ["ActivationRange", "collect_channel_maxima", "collect_ranges", "histogram_edges"]

Array = NDArray[Any]

_BINS_PER_OCTAVE = 64  # a bin is 1.1 % wide
_MIN_EXPONENT, _MAX_EXPONENT = -24, 16  # what is smaller or larger counts as the last bin
_BINS = (_MAX_EXPONENT - _MIN_EXPONENT) * _BINS_PER_OCTAVE


@dataclass(frozen=True)
class ActivationRange:
    """Range and distribution of an activation over all recorded calls.

    Attributes:
        min: smallest value, or 0 if there is none below.
        max: largest value, or 0 if there is none above.
        histogram: (2, bins) numbers of positive and of negative values by log2 |x|, in bins of
            1/64; empty if the values were not counted.
    """

    min: float
    max: float
    histogram: NDArray[np.int64]

    @property
    def magnitude(self) -> float:
        """Largest absolute value."""
        return max(self.max, -self.min)


def histogram_edges() -> NDArray[np.float64]:
    """Return the (bins + 1,) magnitudes between which a histogram counts."""
    return np.asarray(2.0 ** (_MIN_EXPONENT + np.arange(_BINS + 1) / _BINS_PER_OCTAVE))


def collect_ranges(
    model: ir.Model, values: Iterable[ir.Value], feeds: Sequence[Feeds], *, histogram: bool
) -> dict[ir.Value, ActivationRange]:
    """Measure the ranges of activations over all recorded calls.

    Args:
        model: the graph, which is not changed.
        values: its activations to measure.
        feeds: recorded inputs of the graph.
        histogram: count the values in bins too, as the methods ``percentile`` and ``mse`` need.
    """
    graph = _InstrumentedGraph(model)
    values = list(values)
    for value in values:
        for name, operator in (("min", "ReduceMin"), ("max", "ReduceMax")):
            extreme = graph.add(value, operator, [graph.copy_of(value)], keepdims=0)
            graph.add_output(value, name, extreme)
        if histogram:
            graph.add_output(value, "histogram", _add_histogram(graph, value))
    reductions = {"min": np.minimum, "max": np.maximum, "histogram": np.add}
    measured = graph.run(feeds, reductions)
    return {value: _range(measured, value, histogram=histogram) for value in values}


def _range(
    measured: Mapping[tuple[ir.Value, str], Array], value: ir.Value, *, histogram: bool
) -> ActivationRange:
    counts = measured[value, "histogram"] if histogram else np.zeros(0, np.int64)
    return ActivationRange(
        min=min(0.0, float(measured[value, "min"])),
        max=max(0.0, float(measured[value, "max"])),
        histogram=counts.astype(np.int64).reshape(2, -1),
    )


def collect_channel_maxima(
    model: ir.Model, views: Mapping[ir.Value, Sequence[int]], feeds: Sequence[Feeds]
) -> dict[ir.Value, Array]:
    """Measure the largest magnitude of each channel over all recorded calls.

    Args:
        model: the graph, which is not changed.
        views: by activation, the shape for Reshape that makes its channels axis 1.
        feeds: recorded inputs of the graph.

    Returns:
        (channels,) by activation.
    """
    graph = _InstrumentedGraph(model)
    for value, view in views.items():
        magnitude = graph.add(value, "Abs", [graph.copy_of(value)])
        flat = graph.add(value, "Reshape", [magnitude, graph.constant(np.array(view))])
        axes = graph.constant(np.array([axis for axis in range(len(view)) if axis != 1]))
        maxima = graph.add(value, "ReduceMax", [flat, axes], keepdims=0)
        graph.add_output(value, "maxima", maxima)
    measured = graph.run(feeds, {"maxima": np.maximum})
    return {value: measured[value, "maxima"] for value in views}


def _add_histogram(graph: "_InstrumentedGraph", value: ir.Value) -> ir.Value:
    """Add nodes that count an activation's elements in each bin, the positive ones first.

    bin = clip(64 * (log2 |x| + 24), 0, bins - 1), plus the number of bins for negative x;
    ScatterElements adds a one to a vector of zeros at each element's bin.
    """

    def add(operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return graph.add(value, operator, inputs, **attributes)

    x = add("Reshape", graph.copy_of(value), graph.constant(np.array([-1])))
    logarithm = add("Log", add("Abs", x))
    scaled = add("Mul", logarithm, graph.constant(np.float32(_BINS_PER_OCTAVE / np.log(2))))
    offset = graph.constant(np.float32(-_MIN_EXPONENT * _BINS_PER_OCTAVE))
    bounds = [graph.constant(np.float32(bound)) for bound in (0, _BINS - 1)]
    bins = add("Cast", add("Clip", add("Add", scaled, offset), *bounds), to=ir.DataType.INT32)
    negative = add("Cast", add("Less", x, graph.constant(np.float32(0))), to=ir.DataType.INT32)
    index = add("Add", bins, add("Mul", negative, graph.constant(np.int32(_BINS))))
    ones = add("Expand", graph.constant(np.ones(1, np.int32)), add("Shape", x))
    zeros = graph.constant(np.zeros(2 * _BINS, np.int32))
    return add("ScatterElements", zeros, index, ones, reduction="add", axis=0)


class _InstrumentedGraph:
    """Copy of a graph that measures its own activations."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model.clone()
        self._graph = self._model.graph
        nodes = list(self._graph)
        values = [value for node in nodes for value in node.outputs]
        self._copies = {value.name: value for value in [*self._graph.inputs, *values]}
        self._last_nodes: dict[ir.Value, ir.Node] = {}
        self._first = nodes[0]
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        self._outputs: dict[tuple[ir.Value, str], str] = {}

    def copy_of(self, value: ir.Value) -> ir.Value:
        """Return the copy of one of the original graph's values."""
        return self._copies[value.name]

    def constant(self, array: Array | np.generic) -> ir.Value:
        """Return an initializer with these numbers, which equal requests share."""
        array = np.asarray(array)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = add_constant(self._graph, array, "probe")
        return self._constants[key]

    def add(
        self, value: ir.Value, operator: str, inputs: Sequence[ir.Value], **attributes: Any
    ) -> ir.Value:
        """Insert a node right behind an activation and the nodes already added for it."""
        node = ir.node(operator, inputs, attributes)
        last = self._last_nodes.get(value) or self.copy_of(value).producer()
        if last is None:
            self._graph.insert_before(self._first, node)
        else:
            self._graph.insert_after(last, node)
            self._last_nodes[value] = node
        return node.outputs[0]

    def add_output(self, value: ir.Value, statistic: str, measured: ir.Value) -> None:
        """Make a measured value an output, named after the activation and the statistic."""
        measured.name = f"{value.name}.{statistic}"
        self._outputs[value, statistic] = measured.name
        self._graph.outputs.append(measured)

    def run(
        self, feeds: Sequence[Feeds], reductions: Mapping[str, np.ufunc]
    ) -> dict[tuple[ir.Value, str], Array]:
        """Run the graph on every input, and reduce each statistic over all runs."""
        session = open_session(self._model)
        names = list(self._outputs.values())
        statistics = [statistic for _, statistic in self._outputs]
        totals: list[Array] = []
        for feed in feeds:
            arrays = [_as_int64(array) for array in session.run(names, dict(feed))]
            if totals:
                pairs = zip(statistics, totals, arrays, strict=True)
                arrays = [reductions[name](total, array) for name, total, array in pairs]
            totals = arrays
        return dict(zip(self._outputs, totals, strict=True))


def _as_int64(array: Array) -> Array:
    """Widen int32 counts, so that the sum over many runs does not overflow."""
    return array.astype(np.int64) if array.dtype == np.int32 else np.asarray(array)
