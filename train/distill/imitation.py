"""Objective of a recovery: the student's predictions and features are those of its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families.parts import UNet
from latentforge.train.distill.batch import (
    BatchSource,
    Comparison,
    Network,
    SampleSettings,
    Term,
    TrainingBatch,
)
from latentforge.train.distill.losses import mixed
from latentforge.train.distill.module_outputs import Features, compared_paths, shared
from latentforge.train.distill.phases import KEPT
from latentforge.train.distill.training_noise import TrainingNoise

__all__ = ["Imitation"]


class Imitation:
    """Comparison of predictions, guided or not, and of what modules inside put out.

    Attributes:
        source: of the batches, with targets of the task loss if they are of pictures.
        terms: see Objective.
        compared: see Objective.
        frozen: input and output convolutions and the embeddings of timestep and size, which are the
            teacher's, and which every block was made for.
    """

    frozen = KEPT

    def __init__(
        self,
        source: BatchSource,
        terms: Mapping[str, tuple[float, Term]],
        noise: TrainingNoise,
        networks: tuple[UNet, UNet],
        min_snr: float | None = 5.0,
    ) -> None:
        """Watch the modules that both networks have.

        Args:
            source: of the batches.
            terms: see Objective.
            noise: of the teacher's schedule.
            networks: teacher and student.
            min_snr: gamma of min-SNR weighting; None weighs all timesteps alike.
        """
        self.source, self.terms = source, terms
        self._noise, self._min_snr = noise, min_snr
        teacher, student = (network.model for network in networks)
        paths = compared_paths(teacher, student)
        self.compared = paths
        self._features = Features(student, paths), Features(teacher, paths)

    def compare(self, batch: TrainingBatch, student: Network, teacher: Network) -> Comparison:
        """Return the outputs for a batch: see Objective."""
        ours, theirs = self._features
        with torch.no_grad(), theirs.collected() as found:
            wanted, known = teacher(**batch.feeds), dict(found)
        with ours.collected() as values:
            output = student(**batch.feeds)
            features = shared(values, known)
        times = batch.feeds["timestep"]
        if batch.guidance is not None:
            output, wanted = (mixed(batch.guidance, rows) for rows in (output, wanted))
            times = times[: len(output)]
        weight = self._weights(times)
        return Comparison(
            batch=batch, student=output, teacher=wanted, weight=weight, features=features
        )

    def files(self, student: Checkpoint) -> dict[str, dict[str, Any]]:
        """Return nothing: the student stays of its kind."""
        return {}

    def samples(self) -> SampleSettings:
        """Return nothing: the student is drawn with as its teacher is."""
        return SampleSettings()

    def _weights(self, times: Tensor) -> Tensor:
        """Return the weights of timesteps (rows,), which samplers may have between whole ones."""
        if self._min_snr is None:
            return torch.ones_like(times, dtype=torch.float32)
        whole = times.round() if times.is_floating_point() else times
        return self._noise.min_snr_weights(whole.clamp(0, self._noise.steps - 1), self._min_snr)
