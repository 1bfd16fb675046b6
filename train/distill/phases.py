"""Parameters that are trained at a time: first those beside a removal, then all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from latentforge.export.models.searched_structure import Site
from latentforge.train.distill.module_outputs import sites_of

__all__ = ["KEPT", "LowRank", "add_low_rank", "beside_removals", "merge_low_rank", "set_phase"]

KEPT = ("conv_in.", "conv_out.", "time_embedding.", "add_embedding.", "class_embedding.")
"""Beginnings of the names of weights that a recovery leaves as they are."""

_ADDED = "low_rank"


def beside_removals(unet: Any) -> tuple[str, ...]:
    """Return the paths of sites that a student has halved or that are next to a removed one.

    Args:
        unet: a student; of another UNet the result is empty.

    Raises:
        CheckpointError: the structure is not one of this UNet's.
    """
    if not unet.config.get("structure"):
        return ()
    sites, structure = sites_of(unet)
    inner = [site for site in sites if site.kind != "stage"]
    gone = structure.removed(sites)
    near = {site.name for site in inner if site.name in structure.choices}
    for index, site in enumerate(inner):
        if site.name in gone:
            near |= _next_left(inner[:index][::-1], gone) | _next_left(inner[index:], gone)
    return tuple(site.name for site in inner if site.name in near - gone)


def _next_left(sites: Sequence[Site], gone: frozenset[str]) -> set[str]:
    return {next((site.name for site in sites if site.name not in gone), "")} - {""}


def set_phase(
    unet: nn.Module, near: Sequence[str], frozen: tuple[str, ...] = KEPT, *, first: bool
) -> int:
    """Choose what is trained, and return the number of parameters.

    Args:
        unet: the student.
        near: paths of modules that are trained in the first phase, see beside_removals(); all are
            if it is empty.
        frozen: beginnings of the names of weights that are never trained.
        first: train these, norms and biases alone. Additions of low rank are trained in any case,
            and what they are added to never.
    """
    norms = {name for name, module in unet.named_modules() if _is_norm(module)}
    fixed = {name for name, module in unet.named_modules() if hasattr(module, _ADDED)}
    count = 0
    for name, parameter in unet.named_parameters():
        path, _, last = name.rpartition(".")
        early = not near or path in norms or last == "bias" or _inside(name, near)
        trained = f".{_ADDED}." in name or (
            (early or not first) and path not in fixed and not name.startswith(frozen)
        )
        parameter.requires_grad_(trained)
        count += parameter.numel() * trained
    return count


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.GroupNorm | nn.LayerNorm)


def _inside(name: str, paths: Sequence[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


class LowRank(nn.Module):
    """Addition to a layer's output of low rank: LoRA (Hu et al. 2021, arXiv 2106.09685).

    It starts at zero.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            options: Any = {"stride": layer.stride, "padding": layer.padding}
            kernel: Any = layer.kernel_size
            self.down = nn.Conv2d(layer.in_channels, rank, kernel, bias=False, **options)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, values: Tensor) -> Tensor:
        """Return what is added for a layer's input."""
        added: Tensor = self.up(self.down(values))
        return added

    def weight(self) -> Tensor:
        """Return what is added to the layer's weight."""
        up: Any = self.up.weight
        down: Any = self.down.weight
        return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def add_low_rank(
    unet: nn.Module, near: Sequence[str], rank: int, frozen: tuple[str, ...] = KEPT
) -> None:
    """Add LowRank to every layer that the first phase does not train.

    Args:
        unet: the student.
        near: paths of modules that are trained whole.
        rank: at most, for layers that are wider.
        frozen: beginnings of the names of weights that are never trained.
    """
    layers = [
        (name, module)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not _inside(f"{name}.", near)
        and not f"{name}.".startswith(frozen)
    ]
    for _, layer in layers:
        added = LowRank(layer, min(rank, *layer.weight.shape[:2]))
        layer.add_module(_ADDED, added.to(layer.weight))
        layer.register_forward_hook(_add_output)


def _add_output(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added = getattr(layer, _ADDED, None)
    return output if added is None else output + added(inputs[0])


def merge_low_rank(unet: nn.Module) -> None:
    """Add what LowRank has learned to the weights themselves, and remove it."""
    for module in list(unet.modules()):
        added = getattr(module, _ADDED, None)
        if isinstance(added, LowRank):
            weight: Any = module.weight
            weight.data += added.weight().detach()
            delattr(module, _ADDED)
