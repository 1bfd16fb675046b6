"""Structured pruning of a graph: residual branches, then hidden channels, then attention heads."""

from collections.abc import Sequence

import onnx_ir as ir

from latentforge.optimize.prune.blocks import prune_blocks
from latentforge.optimize.prune.channels import prune_channels
from latentforge.optimize.prune.heads import prune_heads
from latentforge.optimize.prune.records import PruneSettings, Removed
from latentforge.runtime.tensor import Feeds

__all__ = ["prune"]


def prune(model: ir.Model, settings: PruneSettings, *, feeds: Sequence[Feeds]) -> list[Removed]:
    """Prune a graph in place.

    Args:
        model: float32 graph in which residual sums are not yet fused with the norms behind them,
            since a branch inside a SkipLayerNormalization is not found. Attention may be fused.
        settings: fractions to remove.
        feeds: recorded inputs of the graph, of all noise levels. Each is run once for channels,
            once for heads, and once per candidate branch for blocks.

    Returns:
        The removed parts, in the order of removal.

    Raises:
        SettingsError: there is something to remove, and feeds is empty.
    """
    removed: list[Removed] = []
    exclude = settings.exclude
    if settings.blocks:
        removed += prune_blocks(model, settings.blocks, exclude, feeds)
    if settings.channels:
        multiple = settings.channel_multiple
        removed += prune_channels(model, settings.channels, exclude, feeds, multiple=multiple)
    if settings.heads:
        removed += prune_heads(model, settings.heads, exclude, feeds)
    return removed
