"""Split the denoiser's graph at a skip connection, for cached steps (DeepCache).

The blocks of a UNet near its input and output are few and cheap, and their features change most
from step to step. The features of the deeper blocks change slowly. DeepCache (Ma et al. 2023, arXiv
2312.00858) therefore runs the whole network on some steps only and keeps the feature that enters a
skip connection from below. On the cached steps between, it runs only the shallow blocks with that
feature:

    full step (denoiser)                       cached step (denoiser_cached)

    sample -> down 0 ---- skip 0 -----+        sample -> down 0 ---- skip 0 -----+
                |                     |                                          |
              down 1 -- skip 1 -+     |                                          |
                |               |     |                                          |
              middle -> Concat -+     |                                          |
                          |           |                                          |
                         up 1         |                                          |
                          |           |                                          |
           cached_feature +-> Concat -+        cached_feature -------> Concat ---+
                                |                                        |
                               up 0 -> out_sample                       up 0 -> out_sample

The split point follows from the graph alone, so this works for any model with skip connections: a
skip connection is a Concat of a value and an ancestor of that value. Level 0 (drawn above) is the
last one before the output, level 1 the one before it, and so on.
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
from latentforge.optimize.search.variants import add_components, load_denoiser
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import CACHED_FEATURE, Manifest
from latentforge.runtime.tensor import TensorSpec

__all__ = ["CACHED_STEP", "STAGE", "add_cached_step", "count_levels", "split"]

CACHED_STEP = f"{DENOISER}_cached"
"""Component that makes cached steps."""

STAGE = "cached-step"
"""Name of the stage in the history of a manifest."""

_CHANNEL_AXES = (1, 3, -1, -3)  # NCHW and NHWC
_SCALES = (1, 2, 4, 8, 16, 32, 64)
"""Factors by which blocks may have reduced the height and width of the sample."""
_UNIT = _SCALES[-1]

_EQUIVALENT = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose")
"""Operators that change the type or layout of a tensor, but not its content."""


def count_levels(model: ir.Model) -> int:
    """Return the number of skip connections at which a graph can be split."""
    return sum(1 for _ in _deep_features(model.graph))


def split(part: GraphPartition, level: int) -> tuple[GraphPartition, GraphPartition]:
    """Split the denoiser's graph at a skip connection.

    Args:
        part: the denoiser, or the part of it that runs at every step; it is not changed.
        level: 0 is the skip connection nearest to the output, where the cached step is cheapest.

    Returns:
        The graph of full steps, with the cached feature as an additional output, and the graph of
        cached steps, with the feature as an input in place of everything that computes it. With
        the feature of the same step both have the same output.

    Raises:
        SettingsError: there is no such level, or the shape of the feature cannot be derived from
            the shapes of the inputs.
    """
    full, cached = part.model.clone(), part.model.clone()
    spec = _feature_spec(part, level)
    feature = _deep_feature(full.graph, level)
    feature.name, feature.type = CACHED_FEATURE, _type(spec)
    feature.shape = ir.Shape(spec.shape)
    full.graph.outputs.append(feature)
    _make_input(cached, _deep_feature(cached.graph, level), spec)
    needed = {str(value.name) for value in cached.graph.inputs}
    inputs = {
        name: own for name, own in (*part.inputs.items(), (CACHED_FEATURE, spec)) if name in needed
    }
    return (
        replace(part, model=full, outputs={**part.outputs, CACHED_FEATURE: spec}),
        replace(
            part,
            model=cached,
            inputs={**inputs, CACHED_FEATURE: spec},
            layers=len(layers(cached.graph)),
        ),
    )


def add_cached_step(source: Path, folder: Path, *, level: int = 0) -> Manifest:
    """Write engines with the additional component CACHED_STEP into a folder.

    Args:
        source: an engine directory of graphs, optimized or not.
        folder: existing and empty.
        level: see split().

    Returns:
        The manifest that was written. Its last stage has under CACHED_STEP the multiply-accumulates
        of a cached step at the default image size (``macs``), and their share of those of a full
        step (``macs_share``).

    Raises:
        ManifestError: the source is damaged, has no graph of the denoiser, or already has
            CACHED_STEP.
        SettingsError: see split().
    """
    start = time.perf_counter()
    manifest, part = load_denoiser(source, CACHED_STEP)
    full, cached = split(part, level)
    sizes = _default_sizes(manifest, part)
    full_macs, cached_macs = (macs(each.model, each.inputs, sizes) for each in (full, cached))
    return add_components(
        source,
        folder,
        {DENOISER: full, CACHED_STEP: cached},
        name=STAGE,
        options={"level": level},
        measured={"macs_share": round(cached_macs / full_macs, 4), "macs": float(cached_macs)},
        start=start,
    )


def _default_sizes(manifest: Manifest, part: GraphPartition) -> dict[str, int]:
    """Return the free dimensions of the sample for one row at the default image size."""
    sides = (manifest.defaults.height, manifest.defaults.width)
    latent = (side // manifest.latent.downscale for side in sides)
    channels = part.inputs["sample"].shape[1]
    named = zip(part.inputs["sample"].shape, (1, channels, *latent), strict=True)
    return {name: int(size) for name, size in named if isinstance(name, str)}


def _deep_feature(graph: ir.Graph, level: int) -> ir.Value:
    features = list(_deep_features(graph))
    if not 0 <= level < len(features):
        allowed = f"0 to {len(features) - 1}" if features else "none, so it cannot be split"
        raise SettingsError(f"no skip connection of level {level}: this denoiser has {allowed}")
    return features[level]


def _deep_features(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the input of each skip connection that comes from the deeper blocks, last one first."""
    for node in reversed(list(graph)):
        if node.op_type != "Concat" or node.attributes.get_int("axis", 0) not in _CHANNEL_AXES:
            continue
        values = [value for value in node.inputs if value is not None]
        if len(values) != 2:
            continue
        for deep, skip in (values, values[::-1]):
            origin = _origin(skip)
            if origin is not _origin(deep) and origin in ancestors(deep):
                yield deep


def _origin(value: ir.Value) -> ir.Value:
    """Return the value before operators that only change its type or layout."""
    while (node := value.producer()) is not None and node.op_type in _EQUIVALENT:
        source = node.inputs[0]
        if source is None:
            break
        value = source
    return value


def _feature_spec(part: GraphPartition, level: int) -> TensorSpec:
    """Return type and symbolic shape of the feature, from its shapes at two sets of sizes."""
    typed = part.model.clone()
    common.ShapeInferencePass(check_type=False, strict_mode=False)(typed)
    feature = _deep_feature(typed.graph, level)
    sizes = (size for spec in part.inputs.values() for size in spec.shape)
    names = dict.fromkeys(s for s in sizes if isinstance(s, str) and s.isidentifier())
    trials = [
        {name: _UNIT * (len(_SCALES) * trial + place) for place, name in enumerate(names, 1)}
        for trial in (1, 2)
    ]
    shapes = [
        infer_shapes(part.model, part.inputs, trial).get(str(feature.name), ()) for trial in trials
    ]
    dimensions = [_dimension(pair, trials) for pair in zip(*shapes, strict=False)]
    shape = tuple(size for size in dimensions if size is not None)
    if len(shape) != 4 or feature.dtype is None:
        raise SettingsError(
            f"cannot split at {feature.name}: its shape {dimensions} cannot be derived from the "
            "inputs; try another level"
        )
    return TensorSpec(feature.dtype.numpy().name, shape)


def _dimension(
    pair: tuple[int | str | None, int | str | None], trials: Sequence[Mapping[str, int]]
) -> int | str | None:
    """Return the number, or fraction of a free dimension, that has these values in two trials."""
    if None in pair or pair[0] == pair[1]:
        return pair[0] if pair[0] == pair[1] else None
    for name in trials[0]:
        for scale in _SCALES:
            if pair == tuple(sizes[name] // scale for sizes in trials):
                return name if scale == 1 else f"{name}//{scale}"
    return None


def _make_input(model: ir.Model, value: ir.Value, spec: TensorSpec) -> None:
    """Replace a value by a graph input, and remove nodes and inputs that become unused."""
    graph = model.graph
    feature = ir.Value(name=CACHED_FEATURE, type=_type(spec), shape=ir.Shape(spec.shape))
    value.replace_all_uses_with(feature)
    graph.inputs.append(feature)
    common.RemoveUnusedNodesPass()(model)
    used = [value for value in graph.inputs if value.uses()]
    graph.inputs.clear()
    graph.inputs.extend(used)


def _type(spec: TensorSpec) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype)))
