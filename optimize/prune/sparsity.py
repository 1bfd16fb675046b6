"""2:4 sparsity: of every four weights along the sum of a layer, two are zero.

Sparse tensor cores skip them, if TensorRT is told to look (SPARSE_WEIGHTS). Weights stay dense in
the file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import GraphLayer, layers, matches
from latentforge.optimize.prune.averages import mean_squares, need_feeds
from latentforge.optimize.prune.slicing import replace, size
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.record import Record
from latentforge.runtime.tensor import Feeds

__all__ = ["Sparse", "Sparsity", "is_sparse24", "sparsify"]

_GROUP = 4


class Sparsity(Record, frozen=True, kw_only=True):
    """Which weights of four stay.

    Attributes:
        score: ``magnitude`` |w|, or ``activation`` |w| * ||x||, where x is what the weight is
            multiplied with, over all recorded inputs (Wanda, Sun et al. 2023, arXiv 2306.11695,
            equation 1).
        keep: patterns, as of fnmatch, of names of layers that stay dense.
    """

    score: Literal["magnitude", "activation"] = "magnitude"
    keep: tuple[str, ...] = ("*conv_in*", "*conv_out*", "*time_emb*", "*add_embedding*")

    def __post_init__(self) -> None:
        if self.score not in ("magnitude", "activation"):
            raise SettingsError(f"sparsity: score is magnitude or activation, not {self.score!r}")


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """A layer that was made 2:4 sparse.

    Attributes:
        name: of the layer.
        score: the share of the squared scores of its weights that is gone, 0 to 1.
        parameters: how many weights became zero that were not.
    """

    name: str
    score: float
    parameters: int


def is_sparse24(array: NDArray[np.generic], axis: int) -> bool:
    """Whether of every four consecutive elements along an axis at least two are zero."""
    if array.shape[axis] % _GROUP:
        return False
    return bool((np.count_nonzero(_groups(array, axis), axis=-1) <= _GROUP // 2).all())


def _groups(array: NDArray[np.generic], axis: int) -> NDArray[np.generic]:
    """A view or copy (…, groups, 4) with the axis last."""
    last = np.moveaxis(array, axis, -1)
    return last.reshape(*last.shape[:-1], -1, _GROUP)


def sparsify(model: ir.Model, settings: Sparsity, *, feeds: Sequence[Feeds] = ()) -> list[Sparse]:
    """Zero the two lesser of every four weights of each layer, and say what that took.

    Four are consecutive input channels, for each output channel and position of a kernel. Layers
    whose input channels are not a multiple of four or in groups are left, as are those that are
    sparse already.

    Args:
        model: edited in place.
        settings: which weights stay.
        feeds: recorded inputs of the graph; needed for the score ``activation``.

    Raises:
        SettingsError: activations are to be measured, and there are no feeds.
    """
    chosen = [layer for layer in layers(model.graph) if _eligible(layer, settings.keep)]
    norms = _norms(model, chosen, settings, feeds)
    made = [_sparsified(model.graph, layer, norms.get(str(layer.input.name))) for layer in chosen]
    common.RemoveUnusedNodesPass()(model)
    return made


def _eligible(layer: GraphLayer, keep: Sequence[str]) -> bool:
    if matches(layer.name, keep):
        return False
    grouped = layer.node.attributes.get_int("group", 1) > 1
    if grouped or size(layer.weight, layer.in_axis) % _GROUP:
        return False
    return not is_sparse24(layer.array, layer.in_axis)


def _norms(
    model: ir.Model,
    chosen: Sequence[GraphLayer],
    settings: Sparsity,
    feeds: Sequence[Feeds],
) -> dict[str, NDArray[np.float64]]:
    """By a layer's input, the root mean square of each channel; a common factor is left out."""
    if settings.score == "magnitude":
        return {}
    need_feeds(feeds, "sparsity with the score activation")
    axes = {str(layer.input.name): -1 if layer.linear else 1 for layer in chosen}
    squares = mean_squares(model, axes, feeds)
    return {name: np.sqrt(square) for name, square in squares.items()}


def _sparsified(graph: ir.Graph, layer: GraphLayer, norms: NDArray[np.float64] | None) -> Sparse:
    weight, axis = layer.array, layer.in_axis
    scores = np.abs(weight, dtype=np.float64)
    if norms is not None:
        scores *= norms.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    keep = _kept(scores, axis)
    squares = np.square(scores)
    gone = float(squares[~keep].sum() / max(squares.sum(), math.ulp(0.0)))
    lost = int(np.count_nonzero(weight[~keep]))
    kind = layer.weight.dtype
    assert kind is not None
    replace(graph, layer.node, 1, (weight * keep).astype(kind.numpy()))
    return Sparse(name=layer.name, score=gone, parameters=lost)


def _kept(scores: NDArray[np.float64], axis: int) -> NDArray[np.bool_]:
    """True for the two largest of four; of equals the first."""
    grouped = _groups(-scores, axis)
    order = np.argsort(grouped, axis=-1, kind="stable")
    keep = np.zeros(grouped.shape, bool)
    np.put_along_axis(keep, order[..., : _GROUP // 2], True, axis=-1)
    moved = np.moveaxis(scores, axis, -1)
    return np.moveaxis(keep.reshape(moved.shape), -1, axis)
