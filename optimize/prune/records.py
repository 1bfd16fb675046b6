"""Settings and results of pruning: plain records, which load no graph code."""

from dataclasses import dataclass
from typing import Literal

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.record import Record
from latentforge.runtime.validation import check_count

__all__ = ["PruneSettings", "Removed", "Sparse", "SparsitySettings"]


_MAX_MULTIPLE = 1 << 16


class PruneSettings(Record, frozen=True, kw_only=True):
    """Structured pruning of a graph.

    Attributes:
        blocks: fraction of all weights that may be removed with residual branches.
        channels: fraction of each MLP's hidden channels to remove.
        heads: fraction of each attention's heads to remove.
        channel_multiple: the number of remaining hidden channels is rounded up to a multiple of
            this, for kernels that compute in tiles.
        exclude: fnmatch patterns of the names of nodes that are not pruned.
    """

    blocks: float = 0.0
    channels: float = 0.0
    heads: float = 0.0
    channel_multiple: int = 8
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("blocks", "channels", "heads"):
            if not 0 <= (fraction := getattr(self, name)) < 1:
                raise SettingsError(
                    f"prune: {name} has to be a fraction from 0 to below 1, not {fraction}"
                )
        check_count("prune: channel_multiple", self.channel_multiple, _MAX_MULTIPLE)


class SparsitySettings(Record, frozen=True, kw_only=True):
    """2:4 sparsity of a graph's layers.

    Attributes:
        score: importance of a weight, of which the two largest of four are kept: ``magnitude``
            |w|, or ``activation`` |w| * ||x||, where x is the input that the weight is multiplied
            with, over all recorded inputs (Wanda, Sun et al. 2023, arXiv 2306.11695, equation 1).
        exclude: fnmatch patterns of the names of layers that stay dense.
    """

    score: Literal["magnitude", "activation"] = "magnitude"
    exclude: tuple[str, ...] = ("*conv_in*", "*conv_out*", "*time_emb*", "*add_embedding*")

    def __post_init__(self) -> None:
        if self.score not in ("magnitude", "activation"):
            raise SettingsError(
                f"sparsity: score has to be magnitude or activation, not {self.score!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Part of a network that was pruned.

    Attributes:
        kind: a residual branch, hidden channels of an MLP, or heads of an attention.
        name: name of its module.
        score: estimated cost of removing it; comparable between parts of the same kind.
        parameters: number of weights removed with it.
    """

    kind: Literal["block", "channels", "heads"]
    name: str
    score: float
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Layer that was made 2:4 sparse.

    Attributes:
        name: name of the layer.
        score: removed fraction of the sum of its weights' squared scores, 0 to 1.
        parameters: number of nonzero weights that were set to zero.
    """

    name: str
    score: float
    parameters: int
