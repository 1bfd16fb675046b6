"""Memory of a training, predicted before it starts.

Weights, gradients and moments are counted; activations are those that a forward pass on the meta
device would save for the backward pass, which computes shapes alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.machine import available_memory
from latentforge.runtime.text import size_text

__all__ = ["TrainingMemory", "check_memory", "predict_memory"]

_FLOAT = 4  # bytes
_PARTS = (BasicTransformerBlock, ResnetBlock2D)
"""Parts of a UNet whose activations diffusers checkpoints."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that a training takes beside what is loaded already.

    Attributes:
        gradients: of the parameters that are trained.
        moments: of AdamW, two for each.
        average: moving average of all weights.
        activations: of student and teacher in a forward pass.
    """

    gradients: int
    moments: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.gradients + self.moments + self.average + self.activations

    def __str__(self) -> str:
        parts = {"gradients and moments": self.gradients + self.moments}
        parts |= {"average of the weights": self.average, "activations": self.activations}
        return ", ".join(f"{size_text(count)} of {name}" for name, count in parts.items())


def predict_memory(
    student: nn.Module,
    trained: int,
    feeds: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> TrainingMemory:
    """Return what a training takes.

    Args:
        student: the denoiser, as it will be trained.
        trained: parameters that are trained.
        feeds: inputs of a forward pass.
        dtype: of activations; of 16 bits, the weights are kept in these as well.
    """
    weights = sum(parameter.numel() for parameter in student.parameters())
    copies = 0 if dtype == torch.float32 else dtype.itemsize * weights
    return TrainingMemory(
        gradients=_FLOAT * trained,
        moments=2 * _FLOAT * trained,
        average=_FLOAT * weights,
        activations=_activations(student, feeds, dtype) + copies,
    )


def check_memory(memory: TrainingMemory, device: torch.device) -> None:
    """Check that a training fits.

    Raises:
        SettingsError: it does not.
    """
    free = available_memory()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    if free is not None and memory.total > free:
        raise SettingsError(
            f"the training needs {size_text(memory.total)} more memory ({memory}), and "
            f"{size_text(free)} is free: lower --batch and raise --accumulation, or use "
            "--checkpointing, --lora-rank or a --precision of 16 bits"
        )


def _activations(student: nn.Module, feeds: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without weights.

    Where activations are checkpointed, the backward pass computes those of one part again at a
    time, of which the largest counts.
    """
    model: Any = _on_meta(student).to(dtype)
    placed = {name: _placed(name, value, dtype) for name, value in feeds.items()}
    total = _saved(model, placed).total
    if not getattr(model.model, "is_gradient_checkpointing", False):
        return total
    model.model.disable_gradient_checkpointing()
    return total + _saved(model, placed).largest


class _SavedBytes:
    """Counter of the bytes that a forward pass saves, without weights.

    Attributes:
        largest: of the part that saves most.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._sizes: dict[int, tuple[int, Any]] = {}
        self._starts: dict[nn.Module, int] = {}
        self.largest = 0

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(size for size, _ in self._sizes.values())

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._sizes[storage._cdata] = storage.nbytes(), storage
        return tensor

    def enter(self, part: nn.Module, _: object) -> None:
        self._starts[part] = self.total

    def leave(self, part: nn.Module, *_: object) -> None:
        self.largest = max(self.largest, self.total - self._starts[part])


def _saved(model: nn.Module, feeds: Mapping[str, Tensor]) -> _SavedBytes:
    """Return what a forward pass saves for the backward pass."""
    saved = _SavedBytes(model)
    with ExitStack() as stack:
        for part in (module for module in model.modules() if isinstance(module, _PARTS)):
            stack.callback(part.register_forward_pre_hook(saved.enter).remove)
            stack.callback(part.register_forward_hook(saved.leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.add, lambda t: t))
        model(**feeds)
    return saved


def _placed(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to("meta", value.dtype if name == "timestep" else dtype)


def _on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of a module without its values."""
    known: dict[int, Any] = {
        id(tensor): nn.Parameter(
            torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad
        )
        for tensor in module.parameters()
    }
    known |= {id(t): torch.empty_like(t, device="meta") for t in module.buffers()}
    return copy.deepcopy(module, known)
