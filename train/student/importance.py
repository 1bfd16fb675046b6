"""Importance of groups, heads and channels inside a UNet's blocks, measured while it runs.

The score of a part is E||h W||**2, where h are the values that it passes to the layer behind it and
W that layer's weights for them: the expected square of what is lost without it. Graphs are pruned
by the same scores (optimize/prune).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from latentforge.export.models.searched_structure import (
    Importance,
    Kept,
    half,
    half_channels,
    list_sites,
)
from latentforge.runtime.errors import SettingsError

__all__ = ["highest", "measured_importance"]


def measured_importance(unet: UNet2DConditionModel, run: Callable[[], object]) -> Importance:
    """Return the parts to keep of every site that can be halved.

    Args:
        unet: the teacher.
        run: runs it, on the states for which parts are important.

    Raises:
        CheckpointError: the UNet has no space of structures.
        SettingsError: the UNet did not run.
    """
    names = [site.name for site in list_sites(unet.config) if "half" in site.choices]
    parts = {name: _parts(unet.get_submodule(name)) for name in names}
    with ExitStack() as stack:
        for row in (row for rows in parts.values() for row in rows.values()):
            stack.enter_context(row.layer.register_forward_pre_hook(row.add))
        run()
    return {
        name: Kept(**{key: row.kept() for key, row in rows.items()}) for name, rows in parts.items()
    }


def highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the highest scores (n,), in rising order; the first of equal ones."""
    order = scores.argsort(descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


@dataclass
class _PartSums:
    """Parts of a layer's input, equal numbers of neighbouring channels, and what they carry.

    Attributes:
        layer: layer behind the parts.
        count: number of parts.
        remaining: number of them that are kept.
        gram: (count, size, size), sum of outer products over all positions.
    """

    layer: Any
    count: int
    remaining: int
    gram: Tensor | None = field(default=None, init=False)

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add the values of one run: (batch, channels, h, w) or (batch, tokens, channels)."""
        values = inputs[0].detach()
        last = values.movedim(1, -1) if values.dim() == 4 else values
        rows = last.reshape(-1, self.count, last.shape[-1] // self.count)
        gram = torch.einsum("tns,tnr->nsr", rows, rows).double()
        self.gram = gram if self.gram is None else self.gram + gram

    def kept(self) -> tuple[int, ...]:
        """Return the parts with the highest scores, trace(W' G W) each."""
        if self.gram is None:
            raise SettingsError("no states to measure the importance of parts on: give prompts")
        columns = self.layer.weight.detach().double().transpose(0, 1).flatten(1)
        columns = columns.reshape(self.count, -1, columns.shape[1])
        return highest(((self.gram @ columns) * columns).sum((1, 2)), self.remaining)


def _parts(module: Any) -> dict[str, _PartSums]:
    """Return the parts of a resnet or a transformer block, by their names in Kept."""
    if isinstance(module, ResnetBlock2D):
        groups = module.norm2.num_groups
        return {"groups": _PartSums(module.conv2, groups, half(groups))}
    last = module.ff.net[2]
    attentions = (("self_heads", module.attn1), ("cross_heads", module.attn2))
    heads = {
        name: _PartSums(attention.to_out[0], attention.heads, half(attention.heads))
        for name, attention in attentions
    }
    return {**heads, "channels": _PartSums(last, last.in_features, half_channels(last.in_features))}
