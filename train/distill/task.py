"""Task loss: the error against the noise that was added to pictures, for students of any noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from latentforge.train.distill.batch import Comparison, Network, Term, TrainingBatch
from latentforge.train.distill.losses import TERMS
from latentforge.train.distill.training_noise import TrainingNoise

__all__ = ["PICTURE_TERMS", "TeacherOfNoise", "task_loss"]


def task_loss(comparison: Comparison) -> Tensor:
    """Return the weighted mean squared error of the student against the target of its batch.

    Ho et al. (2020), equation 14, in the prediction of the student; zero without a target.
    """
    target, student = comparison.batch.target, comparison.student
    if target is None:
        return student.new_zeros(())
    errors = (student.float() - target.float()).square().flatten(1).mean(1)
    return (errors * comparison.weight).mean()


PICTURE_TERMS: Mapping[str, tuple[float, Term]] = {**TERMS, "task": (1.0, task_loss)}
"""Default weights and functions of the terms where there are pictures."""


@dataclass(frozen=True, kw_only=True)
class TeacherOfNoise:
    """Teacher whose noise and prediction differ from the student's, in the student's terms.

    Both have alpha^2 + sigma^2 = 1. So noisy latents of the student are noisy latents of the
    teacher at the timestep of equal SNR, and its prediction is converted by way of the clean
    latent and the noise that it stands for.

    Attributes:
        network: the teacher.
        own: noise of the teacher.
        student: noise of the student.
    """

    network: Network
    own: TrainingNoise
    student: TrainingNoise

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Return the prediction in the student's terms, and a mask (rows,).

        The mask is False for levels that the teacher was not trained at, such as pure noise: only
        pictures say anything about them.
        """
        times, noisy = batch.feeds["timestep"], batch.feeds["sample"]
        own, reached = self.own.equal_times(self.student, times)
        output = self.network(**{**batch.feeds, "timestep": own})
        clean, noise = self._meaning(noisy, output, times)
        return self.student.target(clean, noise, times), reached

    def _meaning(self, noisy: Tensor, output: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clean latents and the noise of a teacher's output, at the student's levels."""
        levels = TrainingNoise(squares=self.student.squares, prediction=self.own.prediction)
        alpha, _ = levels.levels(times, noisy)
        clean = levels.clean(noisy, output, times)
        clean = clean.where(alpha > 0, output.new_zeros(()))  # not reached, and not finite
        return clean, levels.noise(noisy, output, times)
