"""The task loss, and teachers whose noise is another one."""

from typing import Any

import torch
from torch import Tensor

from latentforge.train.distill.batch import Comparison, TrainingBatch
from latentforge.train.distill.task import TeacherOfNoise, task_loss
from latentforge.train.distill.training_noise import TrainingNoise, zero_snr_config

EPSILON = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}


def test_the_loss_is_the_weighted_error_against_the_target() -> None:
    target, student = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[2.0, 0.0]]]])
    batch = TrainingBatch(feeds={}, target=target)
    weight = torch.tensor([1.0, 3.0])
    rows = Comparison(batch=batch, student=student, teacher=target, weight=weight)
    assert task_loss(rows) == (5 * 1 + 2 * 3) / 2
    without = Comparison(
        batch=TrainingBatch(feeds={}), student=student, teacher=target, weight=weight
    )
    assert task_loss(without) == 0


def test_a_teacher_of_epsilon_teaches_v_at_equal_noise() -> None:
    """A teacher that knows its one image predicts what a perfect student of v would."""
    own, student = TrainingNoise.of(EPSILON), TrainingNoise.of(zero_snr_config(EPSILON))
    clean = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def teacher(sample: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        seen.append(timestep)
        squares = torch.lerp(
            own.squares[timestep.floor().long()],
            own.squares[timestep.ceil().long()],
            timestep.frac(),
        ).reshape(-1, 1, 1, 1)
        return (sample - squares.sqrt() * clean) / (1 - squares).sqrt()

    times, added = torch.tensor([20, 400, 900, 999]), torch.randn(4, 4, 3, 3)
    noisy = student.noisy(clean.expand(4, -1, -1, -1), added, times)
    batch = TrainingBatch(feeds={"sample": noisy, "timestep": times})
    output, reached = TeacherOfNoise(network=teacher, own=own, student=student)(batch)
    assert reached.tolist() == [True, True, True, False]
    wanted = student.target(clean, added, times)
    torch.testing.assert_close(output[:3], wanted[:3], atol=5e-3, rtol=5e-3)
    assert output.isfinite().all() and (seen[0][:3] != times[:3]).any()
