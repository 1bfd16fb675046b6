"""2:4 sparsity: of every four consecutive weights over input channels, at least two are zero.

    input channels    0     1     2     3      4     5     6     7
    weights         0.1  -0.4   0.3   0.2   -0.8   0.5   0.6   0.7
    2:4 sparse        0  -0.4   0.3     0   -0.8     0     0   0.7

Sparse tensor cores skip the zeros if TensorRT is built with the flag SPARSE_WEIGHTS. Weights stay
dense in the file.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import GraphLayer, layers, matches
from latentforge.optimize.prune.averages import check_feeds, mean_squares
from latentforge.optimize.prune.records import Sparse, SparsitySettings
from latentforge.optimize.prune.slicing import replace, size
from latentforge.runtime.tensor import Feeds

__all__ = ["is_sparse24", "sparsify"]

_GROUP = 4


def is_sparse24(array: NDArray[np.generic], axis: int) -> bool:
    """Return True if two of every four consecutive elements along an axis are zero, or more."""
    if array.shape[axis] % _GROUP:
        return False
    return bool((np.count_nonzero(_groups(array, axis), axis=-1) <= _GROUP // 2).all())


def _groups(array: NDArray[np.generic], axis: int) -> NDArray[np.generic]:
    """Move an axis last and split it in groups of four: (..., groups, 4)."""
    last = np.moveaxis(array, axis, -1)
    return last.reshape(*last.shape[:-1], -1, _GROUP)


def sparsify(
    model: ir.Model, settings: SparsitySettings, *, feeds: Sequence[Feeds] = ()
) -> list[Sparse]:
    """Set the two weights of lower score in every group of four to zero, in each layer.

    A group is four consecutive input channels, for each output channel and kernel position. Layers
    with grouped channels, or whose number of input channels is not a multiple of four, stay dense;
    layers that are 2:4 sparse already stay as they are.

    Args:
        model: edited in place.
        settings: score of a weight, and layers to exclude.
        feeds: recorded inputs of the graph; needed for the score ``activation``.

    Returns:
        One record per layer that was made sparse.

    Raises:
        SettingsError: the score needs activations, and feeds is empty.
    """
    chosen = [layer for layer in layers(model.graph) if _eligible(layer, settings.exclude)]
    norms = _norms(model, chosen, settings, feeds)
    records = [
        _make_sparse(model.graph, layer, norms.get(str(layer.input.name))) for layer in chosen
    ]
    common.RemoveUnusedNodesPass()(model)
    return records


def _eligible(layer: GraphLayer, exclude: Sequence[str]) -> bool:
    if matches(layer.name, exclude):
        return False
    grouped = layer.node.attributes.get_int("group", 1) > 1
    if grouped or size(layer.weight, layer.in_axis) % _GROUP:
        return False
    return not is_sparse24(layer.array, layer.in_axis)


def _norms(
    model: ir.Model,
    chosen: Sequence[GraphLayer],
    settings: SparsitySettings,
    feeds: Sequence[Feeds],
) -> dict[str, NDArray[np.float64]]:
    """Return the root mean square of each channel, by name of a layer's input.

    It is Wanda's ||x|| up to a factor that all channels have in common.
    """
    if settings.score == "magnitude":
        return {}
    check_feeds(feeds, "sparsity with the score activation")
    axes = {str(layer.input.name): -1 if layer.linear else 1 for layer in chosen}
    squares = mean_squares(model, axes, feeds)
    return {name: np.sqrt(square) for name, square in squares.items()}


def _make_sparse(graph: ir.Graph, layer: GraphLayer, norms: NDArray[np.float64] | None) -> Sparse:
    """Set the weights of lower score to zero; norms are those of the input channels."""
    weight, axis = layer.array, layer.in_axis
    scores = np.abs(weight, dtype=np.float64)
    if norms is not None:
        scores *= norms.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    keep = _keep_mask(scores, axis)
    squares = np.square(scores)
    removed = float(squares[~keep].sum() / max(squares.sum(), math.ulp(0.0)))
    zeroed = int(np.count_nonzero(weight[~keep]))
    dtype = layer.weight.dtype
    assert dtype is not None
    replace(graph, layer.node, 1, (weight * keep).astype(dtype.numpy()))
    return Sparse(name=layer.name, score=removed, parameters=zeroed)


def _keep_mask(scores: NDArray[np.float64], axis: int) -> NDArray[np.bool_]:
    """Return True for the two largest scores of each four; the first ones of equals."""
    grouped = _groups(-scores, axis)
    order = np.argsort(grouped, axis=-1, kind="stable")
    keep = np.zeros(grouped.shape, bool)
    np.put_along_axis(keep, order[..., : _GROUP // 2], True, axis=-1)
    moved = np.moveaxis(scores, axis, -1)
    return np.moveaxis(keep.reshape(moved.shape), -1, axis)
