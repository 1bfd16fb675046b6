"""Contracts between the parts of a training: batches and where they come from, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from latentforge.export.checkpoint import Checkpoint
from latentforge.runtime.denoising.guidance import Guidance

__all__ = [
    "BatchSource",
    "Comparison",
    "Network",
    "Objective",
    "SampleSettings",
    "Term",
    "TrainingBatch",
]


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Rows of inputs of the denoiser.

    Attributes:
        feeds: inputs by name, (rows, ...); the timestep is (rows,).
        guidance: mixes the rows before they are compared, which are then in its order; None
            compares each row.
        target: of the task loss, (rows, channels, h, w); None where there are no pictures.
    """

    feeds: Mapping[str, Tensor]
    guidance: Guidance | None = None
    target: Tensor | None = None

    def to(self, device: torch.device) -> TrainingBatch:
        """Return the batch on a device."""
        feeds = {name: value.to(device) for name, value in self.feeds.items()}
        target = None if self.target is None else self.target.to(device)
        return TrainingBatch(feeds=feeds, guidance=self.guidance, target=target)


class BatchSource(Protocol):
    """Source of batches whose next one depends on its position alone, so that a training resumes.

    A source that keeps an order of its own has it in state().
    """

    def draw(self, rows: int, generator: torch.Generator) -> TrainingBatch:
        """Return a batch of at most so many rows, by a generator for it alone."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position that state() returned."""
        ...


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Outputs of student and teacher for a batch.

    Attributes:
        batch: the batch.
        student: prediction, (rows, channels, h, w), or guided (images, channels, h, w).
        teacher: likewise, without gradients.
        weight: of each row or image by its timestep, (rows,) or (images,).
        features: outputs of the modules that are compared, by path: of the student, and of the
            teacher.
    """

    batch: TrainingBatch
    student: Tensor
    teacher: Tensor
    weight: Tensor
    features: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


Term: TypeAlias = Callable[[Comparison], Tensor]
"""Loss term: a scalar with gradients of the student's outputs."""

Network: TypeAlias = Callable[..., Tensor]
"""Denoiser: (inputs by name) -> prediction (rows, channels, h, w) in float32."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Means to draw with a student's denoiser in place of its teacher's.

    Attributes:
        settings: of requests, in which the student differs from its teacher.
        feeds: inputs that the teacher does not have, one row each.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    feeds: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Goal of a training: what its batches are, and what of student and teacher is compared.

    Attributes:
        source: of the batches.
        terms: default weights and functions of the loss terms, by name.
        frozen: beginnings of the names of weights that stay as they are.
        compared: paths of the UNets' modules whose outputs are compared.
    """

    @property
    def source(self) -> BatchSource: ...

    @property
    def terms(self) -> Mapping[str, tuple[float, Term]]: ...

    @property
    def frozen(self) -> tuple[str, ...]: ...

    @property
    def compared(self) -> tuple[str, ...]: ...

    def compare(self, batch: TrainingBatch, student: Network, teacher: Network) -> Comparison:
        """Return the outputs for a batch: of the student with gradients, of the teacher without."""
        ...

    def files(self, student: Checkpoint) -> dict[str, dict[str, Any]]:
        """Return the JSON files of the trained student that differ from those it had, by path."""
        ...

    def samples(self) -> SampleSettings:
        """Return what the student is drawn with."""
        ...
