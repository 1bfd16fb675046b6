"""Cut the graph of every step at a skip connection, for steps that reuse what changes slowly.

A UNet's blocks near the image are few and cheap, and their features differ most from step to
step; those behind them hardly change. DeepCache (Ma et al. 2023, arXiv 2312.00858) therefore runs
all of it on some steps only, keeps what comes up to a skip connection, and runs on the steps
between what is left: from the sample down to that skip, and from there to the output.

Where that is follows from the graph alone, so nothing here knows a model: a skip connection is a
Concat of a value and one that the value was computed from. Level 0 is the last of them before the
output, level 1 the one before it, and so on.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from latentforge.optimize.graph import layers
from latentforge.optimize.graph_io import DENOISER
from latentforge.optimize.partition.graph_analysis import ancestors, infer_shapes, macs
from latentforge.optimize.partition.hoist import GraphPartition
from latentforge.optimize.search.variants import extend, load_unet
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import CACHED_FEATURE, Manifest
from latentforge.runtime.tensor import TensorSpec

__all__ = ["CACHED_STEP", "STAGE", "add_cached_step", "count_levels", "split"]

CACHED_STEP = f"{DENOISER}_cached"
"""The component that runs on the steps between."""

STAGE = "cached-step"
"""The name in a manifest's history."""

_AXES = (1, 3, -1, -3)  # of channels, first or last
_SCALES = (1, 2, 4, 8, 16, 32, 64)
"""By which blocks may have divided the sides of the sample."""
_UNIT = _SCALES[-1]

_SAME = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose")
"""Operators after which a tensor still has what it had."""


def count_levels(model: ir.Model) -> int:
    """How many skip connections a graph has at which it can be cut."""
    return sum(1 for _ in _deep_sides(model.graph))


def split(part: GraphPartition, level: int) -> tuple[GraphPartition, GraphPartition]:
    """Cut the graph of every step at the skip connection of a level.

    Args:
        part: the UNet, or what is left of it for every step; it is left as it is.
        level: 0 is the skip nearest to the output: the shallow graph is smallest there.

    Returns:
        The full graph, which is the part with one output more, and the shallow graph, which takes
        that with the same name in place of all that it is computed from. From a feature of the
        same step both give the same output.

    Raises:
        SettingsError: there is no skip of that level, or its shape does not follow from the inputs.
    """
    full, shallow = part.model.clone(), part.model.clone()
    spec = _spec(part, level)
    deep = _deep_side(full.graph, level)
    deep.name, deep.type, deep.shape = CACHED_FEATURE, _type(spec), ir.Shape(spec.shape)
    full.graph.outputs.append(deep)
    _cut(shallow, _deep_side(shallow.graph, level), spec)
    taken = {str(value.name) for value in shallow.graph.inputs}
    inputs = {
        name: own for name, own in (*part.inputs.items(), (CACHED_FEATURE, spec)) if name in taken
    }
    return (
        replace(part, model=full, outputs={**part.outputs, CACHED_FEATURE: spec}),
        replace(
            part,
            model=shallow,
            inputs={**inputs, CACHED_FEATURE: spec},
            layers=len(layers(shallow.graph)),
        ),
    )


def add_cached_step(source: Path, folder: Path, *, level: int = 0) -> Manifest:
    """Write engines into a folder, their UNet cut into one that gives the feature, and CACHED_STEP.

    Args:
        source: an engine directory of graphs, optimized or not.
        folder: where to write; it is there and empty.
        level: see split().

    Returns:
        The manifest that was written. Its last stage holds under CACHED_STEP the ``macs_share`` of the
        full graph's multiply-accumulates that the shallow one takes, at the default size.

    Raises:
        ManifestError: the source is damaged, is not made of graphs, or was cut already.
        SettingsError: see split().
    """
    start = time.perf_counter()
    manifest, part = load_unet(source, CACHED_STEP)
    full, shallow = split(part, level)
    sizes = _sizes(manifest, part)
    costs = [macs(each.model, each.inputs, sizes) for each in (full, shallow)]
    return extend(
        source,
        folder,
        {DENOISER: full, CACHED_STEP: shallow},
        name=STAGE,
        options={"level": level},
        measured={"macs_share": round(costs[1] / costs[0], 4), "macs": float(costs[1])},
        start=start,
    )


def _sizes(manifest: Manifest, part: GraphPartition) -> dict[str, int]:
    """One row at the default size of images."""
    sides = (manifest.defaults.height, manifest.defaults.width)
    latent = (side // manifest.latent.downscale for side in sides)
    channels = part.inputs["sample"].shape[1]
    named = zip(part.inputs["sample"].shape, (1, channels, *latent), strict=True)
    return {name: int(size) for name, size in named if isinstance(name, str)}


def _deep_side(graph: ir.Graph, level: int) -> ir.Value:
    found = list(_deep_sides(graph))
    if not 0 <= level < len(found):
        allowed = f"0 to {len(found) - 1}" if found else "none, so it cannot be cut"
        raise SettingsError(f"level {level}: skip connections of this UNet are {allowed}")
    return found[level]


def _deep_sides(graph: ir.Graph) -> Iterator[ir.Value]:
    """Of each skip connection what comes from below, from the output on."""
    for node in reversed(list(graph)):
        if node.op_type != "Concat" or node.attributes.get_int("axis", 0) not in _AXES:
            continue
        values = [value for value in node.inputs if value is not None]
        if len(values) != 2:
            continue
        for deep, skip in (values, values[::-1]):
            origin = _origin(skip)
            if origin is not _origin(deep) and origin in ancestors(deep):
                yield deep


def _origin(value: ir.Value) -> ir.Value:
    """What a value was before it was only written in another way."""
    while (node := value.producer()) is not None and node.op_type in _SAME:
        first = node.inputs[0]
        if first is None:
            break
        value = first
    return value


def _spec(part: GraphPartition, level: int) -> TensorSpec:
    """The feature as a manifest describes it, found by two choices of sizes."""
    typed = part.model.clone()
    common.ShapeInferencePass(check_type=False, strict_mode=False)(typed)
    deep = _deep_side(typed.graph, level)
    sizes = (size for spec in part.inputs.values() for size in spec.shape)
    names = dict.fromkeys(s for s in sizes if isinstance(s, str) and s.isidentifier())
    trials = [
        {name: _UNIT * (len(_SCALES) * turn + place) for place, name in enumerate(names, 1)}
        for turn in (1, 2)
    ]
    found = [infer_shapes(part.model, part.inputs, t).get(str(deep.name), ()) for t in trials]
    known = [_size(pair, trials) for pair in zip(*found, strict=False)]
    shape = tuple(size for size in known if size is not None)
    if len(shape) != 4 or deep.dtype is None:
        raise SettingsError(
            f"cannot cut at {deep.name}: its shape {known} does not follow from the inputs; "
            "try another level"
        )
    return TensorSpec(deep.dtype.numpy().name, shape)


def _size(
    pair: tuple[int | str | None, int | str | None], trials: Sequence[Mapping[str, int]]
) -> int | str | None:
    """What has these sizes in the two trials: a number, or a part of a free dimension."""
    if None in pair or pair[0] == pair[1]:
        return pair[0] if pair[0] == pair[1] else None
    for name in trials[0]:
        for scale in _SCALES:
            if pair == tuple(sizes[name] // scale for sizes in trials):
                return name if scale == 1 else f"{name}//{scale}"
    return None


def _cut(model: ir.Model, deep: ir.Value, spec: TensorSpec) -> None:
    """Make a value an input, and drop what then nothing needs."""
    graph = model.graph
    given = ir.Value(name=CACHED_FEATURE, type=_type(spec), shape=ir.Shape(spec.shape))
    deep.replace_all_uses_with(given)
    graph.inputs.append(given)
    common.RemoveUnusedNodesPass()(model)
    used = [value for value in graph.inputs if value.uses()]
    graph.inputs.clear()
    graph.inputs.extend(used)


def _type(spec: TensorSpec) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype)))
