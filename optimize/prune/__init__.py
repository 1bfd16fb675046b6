"""Make networks smaller without training: residual branches, hidden channels, heads, 2:4 zeros."""

from collections.abc import Sequence

import onnx_ir as ir

from latentforge.optimize.prune.blocks import prune_blocks
from latentforge.optimize.prune.channels import prune_channels
from latentforge.optimize.prune.heads import prune_heads
from latentforge.optimize.prune.records import Removed
from latentforge.optimize.prune.sparsity import Sparse, Sparsity, is_sparse24, sparsify
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.record import Record
from latentforge.runtime.tensor import Feeds

__all__ = ["Prune", "Removed", "Sparse", "Sparsity", "is_sparse24", "prune", "sparsify"]


class Prune(Record, frozen=True, kw_only=True):
    """What to take out of a graph.

    Attributes:
        blocks: the share of all weights that residual branches may take with them.
        channels: the share of each MLP's hidden channels.
        heads: the share of each attention's heads.
        multiple: hidden channels that stay are a multiple of this, where there were so many.
        keep: patterns, as of fnmatch, of names of nodes that stay.
    """

    blocks: float = 0.0
    channels: float = 0.0
    heads: float = 0.0
    multiple: int = 8
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("blocks", "channels", "heads"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise SettingsError(f"prune: {name} is a share from 0 to below 1, not {share}")
        if self.multiple < 1:
            raise SettingsError(f"prune: multiple is a number from 1 up, not {self.multiple}")


def prune(model: ir.Model, settings: Prune, *, feeds: Sequence[Feeds]) -> list[Removed]:
    """Prune a graph in place and say what went, in the order in which it did.

    Args:
        model: in float32, before residual sums are fused with the norms behind them: inside a
            SkipLayerNormalization a branch is not found. Attention may be fused or not.
        settings: how much goes.
        feeds: recorded inputs of the graph, of all noise levels. Each is run once for channels
            and once for heads, and once for every candidate among the blocks.

    Raises:
        SettingsError: something is to be removed, and there are no feeds.
    """
    removed: list[Removed] = []
    keep = settings.keep
    if settings.blocks:
        removed += prune_blocks(model, settings.blocks, keep, feeds)
    if settings.channels:
        multiple = settings.multiple
        removed += prune_channels(model, settings.channels, keep, feeds, multiple=multiple)
    if settings.heads:
        removed += prune_heads(model, settings.heads, keep, feeds)
    return removed
