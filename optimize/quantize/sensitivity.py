"""What each layer in 8 bits does to the final latents, and what it saves."""

import json
import tempfile
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
from latentforge.optimize.quantize.nodes import add_node, add_variant, replace
from latentforge.optimize.quantize.options import Form, Int8, Scan
from latentforge.optimize.quantize.qdq import plan, quantize
from latentforge.optimize.quantize.write import Planned, Writer
from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.tensor import Feeds

__all__ = ["Latents", "Sensitivity", "keep_worst", "scan", "scopes_of", "times_by_module"]

Array = NDArray[Any]

Latents = Callable[[Session], Array]
"""Denoise with the UNet that a session runs, and return the final latents. The same noise and the
same prompts every time."""

_SWITCHES = "int8_layers"
_TIMED = 8  # runs of each graph, spread over the feeds


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one layer in 8 bits does.

    Attributes:
        name: the layer's.
        error: mean squared difference of the final latents, with this layer alone in 8 bits, from
            those of the float graph, by the mean square of the latter.
        bytes: that its weights become smaller by, from float32.
        seconds: that one run becomes shorter by; negative where 8 bits take longer.
    """

    name: str
    error: float
    bytes: int
    seconds: float


def scan(
    model: ir.Model,
    feeds: Sequence[Feeds],
    settings: Int8,
    latents: Latents,
    *,
    form: Form = "onnxruntime",
) -> list[Sensitivity]:
    """Measure every layer that would be quantized, by itself, over a whole denoising run.

    One graph holds both versions of every layer and a switch between them, so that nothing is
    loaded anew for a layer. Times are of the float and the 8-bit graph in turns.

    Args:
        model: a float graph; it stays as it is.
        feeds: its inputs, as for quantize().
        settings: which layers, and which ranges.
        latents: makes the final latents with a session; called once a layer, and once before.
        form: which runtime is to take the graph.

    Returns:
        A record a layer, the largest error first.
    """
    copy = model.clone()
    planned, _ = plan(copy, feeds, settings, form)
    saved: defaultdict[str, int] = defaultdict(int)
    for each in planned:
        saved[each.name] += _bytes_saved(each)
    _add_switches(
        copy.graph,
        planned,
        list(saved),
        Writer(copy.graph, limit=settings.weight_limit(form), form=form),
    )
    errors = _errors(_Switched(open_session(copy), len(saved)), list(saved), latents)
    seconds = _seconds_saved(model, feeds, settings, form, list(saved))
    found = [
        Sensitivity(name=name, error=errors[name], bytes=saved[name], seconds=seconds[name])
        for name in saved
    ]
    return sorted(found, key=lambda record: -record.error)


def keep_worst(records: Sequence[Sensitivity], settings: Scan) -> tuple[str, ...]:
    """The names of the layers to keep in float: those with the most error for what they save.

    Args:
        records: what scan() returned.
        settings: how many, and what counts as saving.
    """

    def saved(record: Sensitivity) -> float:
        return record.seconds if settings.by == "seconds" else record.bytes

    slower = [record for record in records if saved(record) <= 0]
    others = [record for record in records if saved(record) > 0]
    others.sort(key=lambda record: -record.error / saved(record))
    count = max(0, round(settings.share * len(records)) - len(slower))
    return tuple(record.name for record in [*slower, *others[:count]])


class _Switched:
    """A session whose layers are in 8 bits as its mask says: 0 for float, 1 for 8 bits."""

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


def _errors(session: _Switched, names: Sequence[str], latents: Latents) -> dict[str, float]:
    """The relative error that each layer makes by itself."""
    reference = np.asarray(latents(session), np.float64)
    errors: dict[str, float] = {}
    for index, name in enumerate(names):
        session.mask = np.zeros(len(names), np.float32)
        session.mask[index] = 1
        difference = np.asarray(latents(session), np.float64) - reference
        errors[name] = float(np.mean(difference**2) / np.mean(reference**2))
    return errors


def _add_switches(
    graph: ir.Graph, planned: Sequence[Planned], names: Sequence[str], writer: Writer
) -> None:
    """Give a graph one more input, (layers,), that says how far each layer is in 8 bits."""
    mask = ir.Value(
        name=_SWITCHES, shape=ir.Shape([len(names)]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph.inputs.append(mask)
    for each in planned:
        node, scope = each.layer.node, module(each.name)
        index = add_constant(graph, np.asarray(names.index(each.name), np.int64), "switch")
        on = add_node(node, "Gather", [mask, index], name=scope, dtype=ir.DataType.FLOAT)
        x, w = each.layer.input, each.layer.weight
        mixed = [
            _mixed(x, writer.rounded(x, each.input, node, scope), on, node),
            _mixed(w, writer.weight(each), on, node),
        ]
        y = add_variant(node, [*mixed, *node.inputs[2:]])
        if each.output is not None:
            y = _mixed(y, writer.rounded(y, each.output, node, scope), on, node)
        replace(each.layer.output, y)


def _mixed(value: ir.Value, rounded: ir.Value, on: ir.Value, before: ir.Node) -> ir.Value:
    """The value where the switch is 0, the rounded one where it is 1."""
    name = module(str(before.name))
    difference = add_node(before, "Sub", [rounded, value], name=name, like=value)
    part = add_node(before, "Mul", [difference, on], name=name, like=value)
    return add_node(before, "Add", [value, part], name=name, like=value)


def _bytes_saved(each: Planned) -> int:
    """Bytes of a weight in float32 less those in int8 with its scales."""
    array = each.layer.array
    return int(3 * array.size - 4 * array.shape[each.layer.out_axis])


def _seconds_saved(
    model: ir.Model, feeds: Sequence[Feeds], settings: Int8, form: Form, names: Sequence[str]
) -> dict[str, float]:
    """By layer, what a run takes less in 8 bits: medians of runs that take turns."""
    quantized = model.clone()
    quantize(quantized, feeds, settings, form)
    scopes = scopes_of(model, names)
    with tempfile.TemporaryDirectory(prefix="latentforge-scan-") as folder:
        sessions = [
            open_session(graph, profile=str(Path(folder) / name))
            for name, graph in (("float", model), ("int8", quantized))
        ]
        for feed in feeds[:: max(1, len(feeds) // _TIMED)]:
            for session in sessions:
                session.run(None, dict(feed))
        before, after = (times_by_module(session.end_profiling(), scopes) for session in sessions)
    return {name: before[module(name)] - after[module(name)] for name in names}


def scopes_of(model: ir.Model, names: Sequence[str]) -> dict[str, str]:
    """The modules of layers, by what ONNX Runtime's names for their nodes begin with."""
    scopes = {module(name): module(name) for name in names}
    # In ONNX Runtime's own layout a convolution has the name of its output.
    outputs = {layer.name: f"{layer.output.name}_nchwc" for layer in layers(model.graph)}
    return {**scopes, **{outputs[name]: module(name) for name in names}}


def times_by_module(record: str, scopes: Mapping[str, str]) -> defaultdict[str, float]:
    """The median time of what ran of each layer's module.

    Args:
        record: a file of ONNX Runtime's profiler, which adds to names where it fuses, such as
            ``a.b/Conv_token_3`` and ``a.b/MatMul/MatMulAddFusion``.
        scopes: the module by what such a name begins with.
    """
    events: defaultdict[str, list[float]] = defaultdict(list)
    for event in json.loads(Path(record).read_bytes()):
        name = event["name"].removesuffix("_kernel_time")
        if event["cat"] == "Node" and name != event["name"]:
            events[name].append(event["dur"] / 1e6)
    seconds: defaultdict[str, float] = defaultdict(float)
    for name, times in events.items():
        while name and name not in scopes:
            name = name.rpartition("/")[0]
        seconds[scopes.get(name, "")] += float(np.median(times))
    return seconds
