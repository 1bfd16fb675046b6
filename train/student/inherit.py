"""Students that inherit their weights from a teacher, without copies of what stays whole."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from diffusers import UNet2DConditionModel
from torch import nn

from latentforge.export.models.searched_structure import (
    Importance,
    SearchedStructure,
    list_sites,
)
from latentforge.export.models.searched_unet import SearchedUNet2DConditionModel, reduce_unet
from latentforge.runtime.errors import SettingsError

__all__ = ["applied", "student_module"]

Module = TypeVar("Module", bound=nn.Module)


def student_module(
    unet: UNet2DConditionModel, structure: SearchedStructure, importance: Importance
) -> SearchedUNet2DConditionModel:
    """Return a student that shares its weights with the teacher, which does not change.

    Only the weights of halved sites, and repaired biases, are copies.

    Args:
        unet: the teacher.
        structure: structure of the student.
        importance: parts to keep of the sites that are halved, and repairs of what is left.

    Raises:
        CheckpointError: the structure is not one of this UNet's.
        SettingsError: the importance lacks a site that is halved.
    """
    sites = list_sites(unet.config)
    structure.check(sites)
    halved = [name for name, choice in structure.choices.items() if choice == "half"]
    if missing := [name for name in halved if name not in importance]:
        raise SettingsError(f"no importance of the parts of {missing[0]}: measure it first")
    student = _sharing(unet)
    student.__class__ = SearchedUNet2DConditionModel
    student.register_to_config(structure=structure.to_config(sites))
    reduce_unet(student, structure, importance)
    return student


@contextmanager
def applied(
    unet: UNet2DConditionModel, structure: SearchedStructure, importance: Importance
) -> Iterator[None]:
    """Turn a teacher into its student in place, and back at the end.

    Args:
        unet: the teacher, which may be part of another module.
        structure: structure of the student.
        importance: parts to keep of the sites that are halved, and repairs of what is left.

    Raises:
        CheckpointError: the structure is not one of this UNet's.
        SettingsError: the importance lacks a site that is halved.
    """
    student = student_module(unet, structure, importance)
    whole = unet._modules, unet.num_upsamplers
    unet._modules, unet.num_upsamplers = student._modules, student.num_upsamplers
    try:
        yield
    finally:
        unet._modules, unet.num_upsamplers = whole


def _sharing(module: Module) -> Module:
    """Return a copy of a tree of modules, with the same weights and hooks."""
    result = copy.copy(module)
    result._parameters = dict(module._parameters)
    result._modules = {
        name: None if child is None else _sharing(child) for name, child in module._modules.items()
    }
    return result
