"""Memory of a training, predicted before it starts.

Weights, gradients and moments are counted; activations are those that a forward pass on the meta
device would save for the backward pass, which computes shapes alone. Outputs that are compared are
kept as the teacher's, as differences, their squares and gradients; and the backward pass has the
gradients of the widest layer's input and output at once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
_LIBRARIES = 20_000_000  # bytes of reordered weights and scratch space, measured on the demo
_COPIES = 5  # of an output that is compared: teacher, difference, square, and gradients of two
_PARTS = (BasicTransformerBlock, ResnetBlock2D)
"""Parts of a UNet whose activations diffusers checkpoints."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that a training takes beside what is loaded already.

    Attributes:
        gradients: of the parameters that are trained.
        moments: of AdamW, two for each.
        average: moving average of all weights.
        activations: that the student's forward pass saves.
        buffers: outputs that are compared, the widest layer's gradients, and those of libraries.
    """

    gradients: int
    moments: int
    average: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """Sum of all."""
        parts = self.gradients, self.moments, self.average, self.activations, self.buffers
        return sum(parts)

    def __str__(self) -> str:
        parts = {"gradients and moments": self.gradients + self.moments}
        parts |= {"average of the weights": self.average, "activations": self.activations}
        parts |= {"buffers": self.buffers}
        return ", ".join(f"{size_text(count)} of {name}" for name, count in parts.items())


def predict_memory(
    student: nn.Module,
    trained: int,
    feeds: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    compared: Sequence[str] = (),
) -> TrainingMemory:
    """Return what a training takes.

    Args:
        student: the denoiser, as it will be trained.
        trained: parameters that are trained.
        feeds: inputs of a forward pass.
        dtype: of activations; of 16 bits, the weights are kept in these as well.
        compared: paths of the UNet's modules whose outputs are compared with the teacher's.
    """
    weights = sum(parameter.numel() for parameter in student.parameters())
    copies = 0 if dtype == torch.float32 else dtype.itemsize * weights
    return TrainingMemory(
        gradients=_FLOAT * trained,
        moments=2 * _FLOAT * trained,
        average=_FLOAT * weights,
        activations=_activations(student, feeds, dtype) + copies,
        buffers=_buffers(student, feeds, dtype, compared) + _LIBRARIES,
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


def _buffers(
    student: nn.Module, feeds: Mapping[str, Tensor], dtype: torch.dtype, compared: Sequence[str]
) -> int:
    """Return the bytes of what is compared and of the gradients at the widest layer."""
    model: Any = _on_meta(student).to(dtype)
    outputs, layers = _Sizes(), _Sizes()
    for path in compared:
        model.model.get_submodule(path).register_forward_hook(outputs.add)
    for layer in (module for module in model.modules() if not [*module.children()]):
        layer.register_forward_hook(layers.add)
    with torch.no_grad():
        model(**{name: _placed(name, value, dtype) for name, value in feeds.items()})
    # Checkpointing does not save the student's own.
    copies = _COPIES + bool(getattr(model.model, "is_gradient_checkpointing", False))
    return copies * sum(outputs.put_out) + max(layers.both)


class _Sizes:
    """Bytes of the tensors that modules take and put out, one entry for each run of a module.

    Attributes:
        put_out: of the first output.
        both: of it and of the inputs.
    """

    def __init__(self) -> None:
        self.put_out: list[int] = []
        self.both: list[int] = []

    def add(self, _: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        self.put_out.append(_bytes(first))
        self.both.append(_bytes(first) + sum(map(_bytes, given)))


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


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
