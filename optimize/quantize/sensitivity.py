"""Sensitivity of each layer to 8 bits: error of the final latents, bytes and time saved.

Each layer is quantized alone, over a whole denoising run. One graph holds both versions of every
layer and a switch per layer, so that nothing has to be loaded again:

    before    x ─► Conv(w) ─► y

    after     x ─┬─► QuantizeLinear ─► DequantizeLinear ─┬─► mix ─► Conv ─► y
                 └───────────────────────────────────────┤
              int8_layers (layers,) ─► Gather(index) ────┘

where mix(x, rounded, switch) = x + switch * (rounded - x). The weight is mixed in the same way, and
so is the output if the format quantizes it.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from latentforge.optimize.graph import add_constant, layers, module, open_session
from latentforge.optimize.quantize.nodes import add_copy, add_node, replace
from latentforge.optimize.quantize.options import Int8Settings, QuantFormat, SensitivitySettings
from latentforge.optimize.quantize.qdq import plan_layers, quantize
from latentforge.optimize.quantize.write import Int8Writer, PlannedLayer
from latentforge.runtime.backends import LayerTime, Report, Session
from latentforge.runtime.cleanups import temporary_folder
from latentforge.runtime.tensor import Feeds

__all__ = [
    "Denoise",
    "LayerSensitivity",
    "measure_sensitivity",
    "module_times",
    "profiler_scopes",
    "select_sensitive",
]

Array = NDArray[Any]

Denoise = Callable[[Session], Array]
"""Denoise with the network that a session runs, and return the final latents. Noise and prompts are
the same in every call."""

_SWITCHES = "int8_layers"
_TIMED_RUNS = 8  # of each graph, spread over the feeds


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """Effect of quantizing one layer to 8 bits.

    Attributes:
        name: name of the layer.
        error: mean squared error of the final latents with this layer alone in 8 bits, relative to
            the mean square of the float graph's latents.
        bytes: bytes saved by its weights, against float32.
        seconds: time saved in one run of the graph; negative if 8 bits take longer.
    """

    name: str
    error: float
    bytes: int
    seconds: float


def measure_sensitivity(
    model: ir.Model,
    feeds: Sequence[Feeds],
    settings: Int8Settings,
    denoise: Denoise,
    *,
    form: QuantFormat = "onnxruntime",
    report: Report = lambda *_: None,
) -> list[LayerSensitivity]:
    """Measure each layer that would be quantized alone, over a whole denoising run.

    Times come from interleaved runs of the float graph and of the fully quantized one.

    Args:
        model: float graph, which is not changed.
        feeds: its inputs, as for quantize().
        settings: layers to exclude, and the methods of calibration.
        denoise: computes the final latents with a session; called once for the float graph, and
            once per layer.
        form: representation of quantized layers.
        report: called after each layer.

    Returns:
        One record per layer, the largest error first.
    """
    copy = model.clone()
    planned, _ = plan_layers(copy, feeds, settings, form)
    saved: defaultdict[str, int] = defaultdict(int)
    for part in planned:
        saved[part.name] += _bytes_saved(part)
    names = list(saved)
    writer = Int8Writer(copy.graph, limit=settings.weight_limit, form=form)
    _add_switches(copy.graph, planned, names, writer)
    errors = _errors(_SwitchedSession(open_session(copy), len(names)), names, denoise, report)
    seconds = _seconds_saved(model, feeds, settings, form, names)
    records = [
        LayerSensitivity(name=name, error=errors[name], bytes=saved[name], seconds=seconds[name])
        for name in names
    ]
    return sorted(records, key=lambda record: -record.error)


def select_sensitive(
    records: Sequence[LayerSensitivity], settings: SensitivitySettings
) -> tuple[str, ...]:
    """Select the layers to leave in float: those with the largest error per benefit.

    Args:
        records: results of measure_sensitivity().
        settings: fraction of layers to select, and the benefit: bytes or seconds saved. Layers
            without a benefit are always selected, and count.
    """

    def benefit(record: LayerSensitivity) -> float:
        return record.seconds if settings.benefit == "latency" else record.bytes

    useless = [record for record in records if benefit(record) <= 0]
    useful = [record for record in records if benefit(record) > 0]
    useful.sort(key=lambda record: -record.error / benefit(record))
    count = max(0, round(settings.float_fraction * len(records)) - len(useless))
    return tuple(record.name for record in [*useless, *useful[:count]])


class _SwitchedSession:
    """Session of a graph with switches; mask has a 1 for each layer that is to run in 8 bits."""

    def __init__(self, session: ort.InferenceSession, count: int) -> None:
        self.mask = np.zeros(count, np.float32)
        self._session = session
        self._names = [output.name for output in session.get_outputs()]

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        values = self._session.run(self._names, {**feeds, _SWITCHES: self.mask})
        return {name: np.asarray(value) for name, value in zip(self._names, values, strict=True)}

    def layers(self) -> list[LayerTime]:
        return []

    def close(self) -> None:
        pass


def _errors(
    session: _SwitchedSession, names: Sequence[str], denoise: Denoise, report: Report
) -> dict[str, float]:
    """Return the relative error of the latents for each layer alone in 8 bits."""
    reference = np.asarray(denoise(session), np.float64)
    errors: dict[str, float] = {}
    for index, name in enumerate(names):
        session.mask = np.zeros(len(names), np.float32)
        session.mask[index] = 1
        difference = np.asarray(denoise(session), np.float64) - reference
        errors[name] = float(np.mean(difference**2) / np.mean(reference**2))
        report("layer", index + 1, len(names))
    return errors


def _add_switches(
    graph: ir.Graph, planned: Sequence[PlannedLayer], names: Sequence[str], writer: Int8Writer
) -> None:
    """Add an input (layers,) to a graph that blends each layer from float (0) to 8 bits (1)."""
    mask = ir.Value(
        name=_SWITCHES, shape=ir.Shape([len(names)]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph.inputs.append(mask)
    for part in planned:
        node, scope = part.layer.node, module(part.name)
        index = add_constant(graph, np.asarray(names.index(part.name), np.int64), "switch")
        on = add_node(node, "Gather", [mask, index], name=scope, dtype=ir.DataType.FLOAT)
        x, w = part.layer.input, part.layer.weight
        mixed = [
            _mixed(x, writer.rounded(x, part.input, node, scope), on, node),
            _mixed(w, writer.weight(part), on, node),
        ]
        y = add_copy(node, [*mixed, *node.inputs[2:]])
        if part.output is not None:
            y = _mixed(y, writer.rounded(y, part.output, node, scope), on, node)
        replace(part.layer.output, y)


def _mixed(value: ir.Value, rounded: ir.Value, on: ir.Value, before: ir.Node) -> ir.Value:
    """Return the value if the switch is 0, and the rounded one if it is 1."""
    name = module(str(before.name))
    difference = add_node(before, "Sub", [rounded, value], name=name, like=value)
    scaled = add_node(before, "Mul", [difference, on], name=name, like=value)
    return add_node(before, "Add", [value, scaled], name=name, like=value)


def _bytes_saved(part: PlannedLayer) -> int:
    """Return the bytes of a weight in float32 minus those in int8 with its scales."""
    array = part.layer.array
    return int(3 * array.size - 4 * array.shape[part.layer.out_axis])


def _seconds_saved(
    model: ir.Model,
    feeds: Sequence[Feeds],
    settings: Int8Settings,
    form: QuantFormat,
    names: Sequence[str],
) -> dict[str, float]:
    """Return the time per run that each layer saves in 8 bits: medians of interleaved runs."""
    quantized = model.clone()
    quantize(quantized, feeds, settings, form)
    scopes = profiler_scopes(model, names)
    with temporary_folder("latentforge-sensitivity-") as folder:
        sessions = [
            open_session(graph, profile=str(folder / name))
            for name, graph in (("float", model), ("int8", quantized))
        ]
        for feed in feeds[:: max(1, len(feeds) // _TIMED_RUNS)]:
            for session in sessions:
                session.run(None, dict(feed))
        before, after = (module_times(session.end_profiling(), scopes) for session in sessions)
    return {name: before[module(name)] - after[module(name)] for name in names}


def profiler_scopes(model: ir.Model, names: Sequence[str]) -> dict[str, str]:
    """Return the modules of layers by prefix of the node names in ONNX Runtime's profile."""
    scopes = {module(name): module(name) for name in names}
    # A convolution in ONNX Runtime's blocked layout (NCHWc) is named after its output.
    outputs = {layer.name: f"{layer.output.name}_nchwc" for layer in layers(model.graph)}
    return {**scopes, **{outputs[name]: module(name) for name in names}}


def module_times(profile: str, scopes: Mapping[str, str]) -> defaultdict[str, float]:
    """Return the time in seconds of each layer's module: the sum of its nodes' medians.

    Args:
        profile: file of ONNX Runtime's profiler, which appends to the names of fused nodes, as in
            ``a.b/Conv_token_3`` and ``a.b/MatMul/MatMulAddFusion``.
        scopes: modules by prefix of such a name.
    """
    events: defaultdict[str, list[float]] = defaultdict(list)
    for event in json.loads(Path(profile).read_bytes()):
        name = event["name"].removesuffix("_kernel_time")
        if event["cat"] == "Node" and name != event["name"]:
            events[name].append(event["dur"] / 1e6)
    seconds: defaultdict[str, float] = defaultdict(float)
    for name, times in events.items():
        while name and name not in scopes:
            name = name.rpartition("/")[0]
        seconds[scopes.get(name, "")] += float(np.median(times))
    return seconds
