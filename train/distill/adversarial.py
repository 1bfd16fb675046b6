"""Adversarial term: a small discriminator of clean latents, trained beside the student.

It tells the latents that the teacher predicts from those that the student predicts for the same
noisy latents, and the student learns to pass for the teacher: squared errors alone average over
what could be, and blur. Hinge losses: Lim & Ye (2017), arXiv 1705.02894; the prompt by projection:
Miyato & Koyama (2018), arXiv 1802.05637.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentforge.train.distill.batch import Comparison
from latentforge.train.distill.training_noise import TrainingNoise

__all__ = ["AdversarialTerm", "LatentDiscriminator"]

_GROUPS = 8
_MIN_SIGNAL = 0.1  # alpha**2 below which a clean prediction is a mean of many images


class LatentDiscriminator(nn.Module):
    """Convolutional network from clean latents and a prompt to one score per patch."""

    def __init__(self, channels: int, context: int, width: int = 64) -> None:
        """Initialize with random weights.

        Args:
            channels: of the latents.
            context: width of encoder_hidden_states.
            width: of the first layer, a multiple of 8.
        """
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(_GROUPS, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(_GROUPS, 2 * width),
            nn.SiLU(),
        )
        self.score = nn.Conv2d(2 * width, 1, 1)
        self.prompt = nn.Linear(context, 2 * width, bias=False)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """Return scores (rows, patches), high for the teacher's.

        Args:
            latents: clean, (rows, channels, h, w).
            context: encoder_hidden_states, (rows, tokens, width).
        """
        hidden = self.body(latents)
        prompt = self.prompt(context.mean(1))[:, :, None, None]
        scores: Tensor = self.score(hidden) + (hidden * prompt).mean(1, keepdim=True)
        return scores.flatten(1)


class AdversarialTerm:
    """Loss term that trains its discriminator each time that it is computed.

    Attributes:
        discriminator: the network.
        optimizer: of its weights; both belong to the state of a training.
    """

    def __init__(
        self, discriminator: LatentDiscriminator, noise: TrainingNoise, rate: float = 2e-4
    ) -> None:
        """Bind a discriminator.

        Args:
            discriminator: on the device of the student.
            noise: of student and teacher.
            rate: learning rate of the discriminator.
        """
        self.discriminator, self._noise = discriminator, noise
        self.optimizer = torch.optim.Adam(discriminator.parameters(), rate, betas=(0.0, 0.99))

    def __call__(self, comparison: Comparison) -> Tensor:
        """Return the student's loss, which falls as its latents pass for the teacher's.

        Rows with too little signal are left out; without any left the loss is 0.
        """
        pair = self._clean(comparison)
        if not len(pair[0]):
            return comparison.student.new_zeros(())
        student, teacher, context = pair
        with torch.enable_grad():
            self._train(student.detach(), teacher.detach(), context)
        self.discriminator.requires_grad_(False)  # no gradients of the student's loss
        loss = -self.discriminator(student, context).mean()
        self.discriminator.requires_grad_(True)
        return loss

    def _clean(self, comparison: Comparison) -> tuple[Tensor, Tensor, Tensor]:
        """Return clean latents of student and teacher, and the prompts' embeddings."""
        feeds, images = comparison.batch.feeds, len(comparison.student)
        noisy, times = feeds["sample"][-images:], feeds["timestep"][-images:]
        context = feeds["encoder_hidden_states"][-images:]  # of the positive prompts, with guidance
        kept = (self._noise.squares[times.cpu().long()] > _MIN_SIGNAL).to(noisy.device)
        student, teacher = (
            self._noise.clean(noisy, output.float(), times)[kept]
            for output in (comparison.student, comparison.teacher)
        )
        return student, teacher, context[kept]

    def _train(self, student: Tensor, teacher: Tensor, context: Tensor) -> None:
        """Update the discriminator on latents of both."""
        self.optimizer.zero_grad()
        real, drawn = self.discriminator(teacher, context), self.discriminator(student, context)
        loss = functional.relu(1 - real).mean() + functional.relu(1 + drawn).mean()
        loss.backward()
        self.optimizer.step()
