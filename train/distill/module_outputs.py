"""Outputs of modules inside a student and its teacher, collected by hooks while these run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from latentforge.export.models.searched_structure import SearchedStructure, Site, list_sites

__all__ = ["ATTENTION", "Features", "compared_paths", "droppable", "dropped", "shared", "sites_of"]

ATTENTION = "attn1"
"""Name of diffusers' modules of self-attention."""


class Features:
    """Outputs of a network's modules, by path, in one run."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._values: dict[str, Tensor] = {}
        self._active = False
        for path in paths:
            model.get_submodule(path).register_forward_hook(partial(self._add, path))

    @contextmanager
    def collected(self) -> Iterator[dict[str, Tensor]]:
        """Yield the outputs of the run inside of the block.

        Modules run again in the backward pass if their activations are checkpointed, which is
        after the block.
        """
        self._values, self._active = {}, True
        try:
            yield self._values
        finally:
            self._values, self._active = {}, False

    def _add(self, path: str, _: nn.Module, __: object, output: Any) -> None:
        if self._active:
            self._values[path] = output[0] if isinstance(output, tuple) else output


def compared_paths(teacher: nn.Module, student: nn.Module) -> tuple[str, ...]:
    """Return the paths of blocks and self-attentions that both networks have.

    Args:
        teacher: diffusers' UNet.
        student: one with the same module paths, some of which are missing.
    """
    names = {name for name, module in student.named_modules() if module is not None}
    blocks = [name for name, _ in teacher.named_modules() if _is_block(name)]
    inner = [n for n, _ in teacher.named_modules() if n.rpartition(".")[2] == ATTENTION]
    return tuple(name for name in (*blocks, *inner) if name in names)


def _is_block(name: str) -> bool:
    parts = name.split(".")
    return name == "mid_block" or (len(parts) == 2 and parts[0] in ("down_blocks", "up_blocks"))


def sites_of(unet: Any) -> tuple[tuple[Site, ...], SearchedStructure]:
    """Return the sites of a whole UNet, and the structure that a student of it has.

    Args:
        unet: diffusers' UNet2DConditionModel, or a searched one.

    Raises:
        CheckpointError: it has no space of structures, or the structure is not one of it.
    """
    sites = list_sites({**unet.config, "structure": None})
    config = unet.config.get("structure")
    if not config:
        return sites, SearchedStructure(choices={})
    return sites, SearchedStructure.from_config(config, sites)


def droppable(student: Any) -> tuple[str, ...]:
    """Return the paths of a student's modules that can be left out, in order.

    Args:
        student: diffusers' UNet2DConditionModel, or a searched one.

    Raises:
        CheckpointError: see sites_of().
    """
    sites, structure = sites_of(student)
    gone = structure.removed(sites)
    offered = (site for site in sites if site.kind != "stage" and "drop" in site.choices)
    return tuple(site.name for site in offered if site.name not in gone)


@contextmanager
def dropped(student: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Leave modules out inside of the block: they return their input."""
    with ExitStack() as stack:
        for path in paths:
            hook = student.get_submodule(path).register_forward_hook(_return_input)
            stack.enter_context(hook)
        yield


def _return_input(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return the input; of a resnet behind a skip connection the part in front of it."""
    if isinstance(module, ResnetBlock2D):
        return inputs[0][:, : output.shape[1]]
    return inputs[0]


def shared(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return pairs of outputs that have the same shape, by path."""
    return {
        path: (value, teacher[path].to(torch.float32))
        for path, value in student.items()
        if path in teacher and teacher[path].shape == value.shape
    }
