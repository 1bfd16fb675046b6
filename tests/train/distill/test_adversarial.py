"""The discriminator of latents, and the term that trains it."""

from typing import Any

import torch
from torch import Tensor

from latentforge.train.distill.adversarial import AdversarialTerm, LatentDiscriminator
from latentforge.train.distill.batch import Comparison, TrainingBatch
from latentforge.train.distill.training_noise import TrainingNoise

NOISE = TrainingNoise.of({"_class_name": "DDIMScheduler", "prediction_type": "sample"})


def comparison(student: Tensor, teacher: Tensor, time: int = 100, rows: int = 1) -> Comparison:
    """Return a comparison of clean predictions; more rows are those of guidance."""
    count = len(student)
    feeds = {
        "sample": torch.zeros(count * rows, *student.shape[1:]),
        "timestep": torch.full((count * rows,), time),
        "encoder_hidden_states": torch.randn(count * rows, 3, 16),
    }
    weight = torch.ones(count)
    return Comparison(
        batch=TrainingBatch(feeds=feeds), student=student, teacher=teacher, weight=weight
    )


def term() -> AdversarialTerm:
    """Return a term with a small discriminator."""
    torch.manual_seed(0)
    return AdversarialTerm(LatentDiscriminator(4, 16, width=8), NOISE, rate=5e-3)


def test_a_student_learns_to_pass_for_its_teacher() -> None:
    """Only the mean tells the two apart, and nothing but the discriminator's gradient says so."""
    adversarial, mean = term(), torch.full((4,), -2.0, requires_grad=True)
    optimizer = torch.optim.Adam([mean], 0.1, betas=(0.0, 0.99))
    for _ in range(120):
        student = torch.randn(16, 4, 6, 6) + mean[:, None, None]
        loss = adversarial(comparison(student, torch.randn(16, 4, 6, 6) + 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (mean - 1).abs().max() < 1.5  # it began 3 away


def test_the_discriminator_learns_from_its_own_loss_alone() -> None:
    adversarial, student = term(), torch.randn(4, 4, 6, 6, requires_grad=True)
    loss: Any = adversarial(comparison(student, torch.randn(4, 4, 6, 6), rows=2))
    gradients = [weight.grad for weight in adversarial.discriminator.parameters()]
    before = [gradient.clone() for gradient in gradients if gradient is not None]
    loss.backward()
    after = [weight.grad for weight in adversarial.discriminator.parameters()]
    assert before and all(map(torch.equal, [g for g in after if g is not None], before))
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_rows_that_are_nearly_noise_are_left_out() -> None:
    latents = torch.randn(2, 4, 6, 6, requires_grad=True)
    assert term()(comparison(latents, latents.detach(), time=999)) == 0
