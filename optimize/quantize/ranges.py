"""How large activations get: measured inside the graph, so that none of them is ever kept."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentforge.optimize.graph import add_constant, open_session
from latentforge.optimize.quantize.options import Int8
from latentforge.runtime.tensor import Feeds

__all__ = ["Grid", "Spread", "channel_peaks", "grid", "spreads"]

Array = NDArray[Any]

_OCTAVE = 64  # bins for every doubling: a bin is 1.1 % wide
_LOWEST, _HIGHEST = -24, 16  # powers of two; what is smaller or larger counts as the last bin
_BINS = (_HIGHEST - _LOWEST) * _OCTAVE
_CLIPS = 2.0 ** (-np.arange(33) / 8)  # of the whole range, down to a sixteenth


@dataclass(frozen=True)
class Grid:
    """The numbers that 8 bits stand for: (q - zero) * scale for q from low to high."""

    scale: float
    zero: int
    low: int
    high: int

    def round(self, x: Array) -> Array:
        """The nearest number on the grid, as QuantizeLinear and DequantizeLinear give it."""
        steps = np.clip(np.rint(x / self.scale) + self.zero, self.low, self.high)
        return np.asarray((steps - self.zero) * self.scale)


@dataclass(frozen=True)
class Spread:
    """What values an activation took over all inputs.

    Attributes:
        low: the smallest, or 0 if none is below.
        high: the largest, or 0 if none is above.
        counts: (2, bins) of how many positive and how many negative ones there are, by log2 |x|
            in bins of 1/64; empty if they were not counted.
    """

    low: float
    high: float
    counts: NDArray[np.int64]

    @property
    def peak(self) -> float:
        return max(self.high, -self.low)


def grid(spread: Spread, settings: Int8, *, signed: bool) -> Grid:
    """The grid for an activation: int8 and symmetric, or uint8.

    Args:
        spread: of its values.
        settings: which method says where to clip; uint8 is symmetric too if they say so.
        signed: int8, of which -128 is left out.
    """
    clip = _clip(spread, settings, symmetric=signed or settings.symmetric)
    return _grid(spread, clip, signed=signed, symmetric=settings.symmetric)


def _grid(spread: Spread, clip: float, *, signed: bool, symmetric: bool) -> Grid:
    """The grid up to a magnitude of clip; it always holds 0, which padding and masks need."""
    low, high = max(spread.low, -clip), min(spread.high, clip)
    if signed or symmetric or low == high:
        zero = 0 if signed else 128
        return Grid(_scale(max(high, -low) / 127), zero, zero - 127, zero + 127)
    scale = _scale((high - low) / 255)
    return Grid(scale, int(np.clip(np.rint(-low / scale), 0, 255)), 0, 255)


def _scale(step: float) -> float:
    """A step as float32 holds it; 1 for a tensor that is all zeros."""
    return float(np.float32(step)) if step > np.finfo(np.float32).tiny else 1.0


def _clip(spread: Spread, settings: Int8, *, symmetric: bool) -> float:
    if settings.ranges == "minmax" or not spread.counts.sum():
        return spread.peak
    if settings.ranges == "percentile":
        total = np.cumsum(spread.counts.sum(axis=0))
        index = int(np.searchsorted(total, settings.percentile / 100 * total[-1]))
        return min(spread.peak, float(_edges()[index + 1]))
    centers = np.sqrt(_edges()[:-1] * _edges()[1:])
    values = np.minimum(np.stack([centers, -centers]), spread.peak)
    clips = spread.peak * _CLIPS
    grids = [_grid(spread, clip, signed=False, symmetric=symmetric) for clip in clips]
    errors = [np.sum(spread.counts * (each.round(values) - values) ** 2) for each in grids]
    return float(clips[int(np.argmin(errors))])


def _edges() -> NDArray[np.float64]:
    return np.asarray(2.0 ** (_LOWEST + np.arange(_BINS + 1) / _OCTAVE))


def channel_peaks(
    model: ir.Model, views: Mapping[ir.Value, Sequence[int]], feeds: Sequence[Feeds]
) -> dict[ir.Value, Array]:
    """The largest magnitude of each channel over all inputs.

    Args:
        model: stays as it is.
        views: by activation, the shape that Reshape gives it so that its channels are axis 1.
        feeds: inputs to run it on.

    Returns:
        (channels,) by activation.
    """
    probes = _Probes(model)
    for value, view in views.items():
        magnitude = probes.add(value, "Abs", [probes.twin(value)])
        flat = probes.add(value, "Reshape", [magnitude, probes.constant(np.array(view))])
        axes = probes.constant(np.array([axis for axis in range(len(view)) if axis != 1]))
        probes.give(value, "peaks", probes.add(value, "ReduceMax", [flat, axes], keepdims=0))
    found = probes.run(feeds, {"peaks": np.maximum})
    return {value: found[value, "peaks"] for value in views}


def spreads(
    model: ir.Model, values: Iterable[ir.Value], feeds: Sequence[Feeds], *, count: bool
) -> dict[ir.Value, Spread]:
    """What values activations take over all inputs; counted in bins only where that is asked for.

    The model stays as it is.
    """
    probes = _Probes(model)
    values = list(values)
    for value in values:
        for name, operator in (("low", "ReduceMin"), ("high", "ReduceMax")):
            end = probes.add(value, operator, [probes.twin(value)], keepdims=0)
            probes.give(value, name, end)
        if count:
            probes.give(value, "counts", _histogram(probes, value))
    merge = {"low": np.minimum, "high": np.maximum, **({"counts": np.add} if count else {})}
    found = probes.run(feeds, merge)
    return {value: _spread(found, value, count=count) for value in values}


def _spread(found: Mapping[tuple[ir.Value, str], Array], value: ir.Value, *, count: bool) -> Spread:
    counts = found[value, "counts"] if count else np.zeros(0, np.int64)
    return Spread(
        low=min(0.0, float(found[value, "low"])),
        high=max(0.0, float(found[value, "high"])),
        counts=counts.astype(np.int64).reshape(2, -1),
    )


def _histogram(probes: "_Probes", value: ir.Value) -> ir.Value:
    """How many elements of an activation fall into each bin, the positive ones first."""

    def add(operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return probes.add(value, operator, inputs, **attributes)

    x = add("Reshape", probes.twin(value), probes.constant(np.array([-1])))
    octaves = add("Log", add("Abs", x))
    scaled = add("Mul", octaves, probes.constant(np.float32(_OCTAVE / np.log(2))))
    shifted = add("Add", scaled, probes.constant(np.float32(-_LOWEST * _OCTAVE)))
    ends = [probes.constant(np.float32(end)) for end in (0, _BINS - 1)]
    bins = add("Cast", add("Clip", shifted, *ends), to=ir.DataType.INT32)
    negative = add("Cast", add("Less", x, probes.constant(np.float32(0))), to=ir.DataType.INT32)
    offset = add("Mul", negative, probes.constant(np.int32(_BINS)))
    index = add("Add", bins, offset)
    ones = add("Expand", probes.constant(np.ones(1, np.int32)), add("Shape", x))
    empty = probes.constant(np.zeros(2 * _BINS, np.int32))
    return add("ScatterElements", empty, index, ones, reduction="add", axis=0)


class _Probes:
    """A copy of a model that measures its own activations."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model.clone()
        self._graph = self._model.graph
        nodes = list(self._graph)
        made = [value for node in nodes for value in node.outputs]
        self._twins = {value.name: value for value in [*self._graph.inputs, *made]}
        self._ends: dict[ir.Value, ir.Node] = {}
        self._first = nodes[0]
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        self._outputs: dict[tuple[ir.Value, str], str] = {}

    def twin(self, value: ir.Value) -> ir.Value:
        """The value of the copy that stands for one of the model."""
        return self._twins[value.name]

    def constant(self, array: Array | np.generic) -> ir.Value:
        """An initializer, one for all who ask for the same."""
        array = np.asarray(array)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = add_constant(self._graph, array, "probe")
        return self._constants[key]

    def add(
        self, value: ir.Value, operator: str, inputs: Sequence[ir.Value], **attributes: Any
    ) -> ir.Value:
        """A node that runs as soon as a value is there, after those added for it before."""
        node = ir.node(operator, inputs, attributes)
        end = self._ends.get(value) or self.twin(value).producer()
        if end is None:
            self._graph.insert_before(self._first, node)
        else:
            self._graph.insert_after(end, node)
            self._ends[value] = node
        return node.outputs[0]

    def give(self, value: ir.Value, what: str, measured: ir.Value) -> None:
        """Make a measured value an output, under the activation's name and what it is."""
        measured.name = f"{value.name}.{what}"
        self._outputs[value, what] = measured.name
        self._graph.outputs.append(measured)

    def run(
        self, feeds: Sequence[Feeds], merge: Mapping[str, np.ufunc]
    ) -> dict[tuple[ir.Value, str], Array]:
        """Run on every input, and merge what each run measured."""
        session = open_session(self._model)
        names = list(self._outputs.values())
        kinds = [what for _, what in self._outputs]
        totals: list[Array] = []
        for feed in feeds:
            found = [_wide(array) for array in session.run(names, dict(feed))]
            if totals:
                both = zip(kinds, totals, found, strict=True)
                found = [merge[kind](total, array) for kind, total, array in both]
            totals = found
        return dict(zip(self._outputs, totals, strict=True))


def _wide(array: Array) -> Array:
    """Counts in 64 bits, so that many runs add up."""
    return array.astype(np.int64) if array.dtype == np.int32 else np.asarray(array)
