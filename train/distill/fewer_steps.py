"""Students that need fewer steps: consistency distillation, and distillation of guidance.

Latent consistency models (Luo et al. 2023, arXiv 2310.04378) predict, from any point of a guided
trajectory, where it ends. The student's prediction from a noisy point has to equal its own from a
point that the teacher reaches in one step of DDIM over many timesteps:

    noisy x at t ─── student ──────────────────────► clean  ◄─┐
       └── teacher, guided: one step of DDIM to t'            │ Huber
               └──── the student again ─────────► clean  ◄─┘

Guidance is folded in: either the scale is an input of the student (timestep_cond), or it is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from latentforge.export.schedulers import prediction_of
from latentforge.runtime.conditioning.encode import guidance_embedding
from latentforge.runtime.errors import CheckpointError, SettingsError
from latentforge.train.distill.batch import Comparison, Network, TrainingBatch
from latentforge.train.distill.clean_latents import CleanSource
from latentforge.train.distill.losses import rescaled
from latentforge.train.distill.request import CONSISTENCY_STEPS
from latentforge.train.distill.training_noise import TrainingNoise, beta_config

__all__ = [
    "ConsistencyPlan",
    "FewerSteps",
    "GuidedBatch",
    "add_guidance_input",
    "embedded_scales",
    "huber_loss",
    "lcm_config",
]

_SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class ConsistencyPlan:
    """Parameters of consistency distillation.

    Attributes:
        steps: of the teacher's DDIM, in which it is skipped from one timestep to the next; sampling
            takes a choice of them.
        scales: lowest and highest guidance scale that the student learns; equal ones are fixed.
        width: of the input of the scale; 0 gives the student no such input.
        rescale: of the guided predictions' deviation: see rescale_guidance().
        timestep_scaling: of the boundary condition: the larger, the nearer to the clean prediction
            at all timesteps but 0.

    Raises:
        SettingsError: a student without the input has to learn several scales.
    """

    steps: int = CONSISTENCY_STEPS
    scales: tuple[float, float] = (3.0, 15.0)
    width: int = 256
    rescale: float = 0.0
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        low, high = self.scales
        if not self.width and low != high:
            raise SettingsError(
                "a student without an input of the guidance scale learns one scale: give it once"
            )
        if not 1 <= low <= high:
            raise SettingsError(
                f"guidance scales must rise from 1 on, not from {low:g} to {high:g}"
            )


@dataclass(frozen=True, kw_only=True)
class GuidedBatch(TrainingBatch):
    """Noisy latents, with the guidance that each row learns; feeds are those of the student.

    Attributes:
        end: timesteps that the teacher steps to, (rows,).
        scale: guidance scales, (rows,).
        condition: inputs of the teacher by name, besides latents and timestep, for the prompts.
        free: the same inputs for the empty prompt.
    """

    end: Tensor
    scale: Tensor
    condition: Mapping[str, Tensor]
    free: Mapping[str, Tensor]

    @property
    def noisy(self) -> Tensor:
        """Noisy latents, (rows, channels, h, w)."""
        return self.feeds["sample"]

    @property
    def start(self) -> Tensor:
        """Timesteps of the noisy latents, (rows,)."""
        return self.feeds["timestep"]

    def to(self, device: torch.device) -> GuidedBatch:
        """Return the batch on a device."""

        def moved(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(device) for name, value in rows.items()}

        return GuidedBatch(
            feeds=moved(self.feeds),
            end=self.end.to(device),
            scale=self.scale.to(device),
            condition=moved(self.condition),
            free=moved(self.free),
        )


class FewerSteps:
    """Source of batches of consistency and of guidance distillation, and their comparisons.

    Attributes:
        plan: parameters.
    """

    def __init__(self, source: CleanSource, noise: TrainingNoise, plan: ConsistencyPlan) -> None:
        """Add noise to the latents of a source.

        Args:
            source: of clean latents.
            noise: of teacher and student.
            plan: parameters.

        Raises:
            SettingsError: there are more steps than timesteps.
        """
        if not 1 <= plan.steps <= noise.steps:
            raise SettingsError(f"steps must be from 1 to {noise.steps}, not {plan.steps}")
        self._source, self._noise, self.plan = source, noise, plan

    def draw(self, rows: int, generator: torch.Generator) -> GuidedBatch:
        """Return a batch, by a generator for it alone."""
        drawn = self._source.draw(rows, generator)
        skip, (low, high) = self._noise.steps // self.plan.steps, self.plan.scales
        start = skip * torch.randint(1, self.plan.steps + 1, (rows,), generator=generator) - 1
        added = torch.randn(drawn.latents.shape, generator=generator)
        scale = low + (high - low) * torch.rand(rows, generator=generator)
        noisy = {"sample": self._noise.noisy(drawn.latents, added, start), "timestep": start}
        return GuidedBatch(
            feeds={**noisy, **drawn.condition, **self._embedded(scale)},
            end=(start - skip).clamp(min=0),
            scale=scale,
            condition=drawn.condition,
            free=drawn.free,
        )

    def state(self) -> dict[str, Any]:
        """Return the position of the source."""
        return self._source.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position of the source."""
        self._source.restore(state)

    def consistency(self, batch: GuidedBatch, student: Network, teacher: Network) -> Comparison:
        """Return where the student sees the trajectories end, from both points.

        Of the nearer point the student itself is the target, without gradients: a moving average
        there is biased (Song & Dhariwal 2023, arXiv 2310.14189, section 3.2).

        Args:
            batch: by draw().
            student: with gradients.
            teacher: without an input of the scale.
        """
        with torch.no_grad():
            nearer = self._teacher_step(batch, teacher)
            wanted = self._end(student, {**batch.feeds, "sample": nearer, "timestep": batch.end})
        ends = self._end(student, batch.feeds)
        weight = torch.ones(len(ends), device=ends.device)
        return Comparison(batch=batch, student=ends, teacher=wanted, weight=weight)

    def guidance(self, batch: GuidedBatch, student: Network, teacher: Network) -> Comparison:
        """Return the student's predictions beside the teacher's guided ones.

        Stage one of Meng et al. (2023), arXiv 2210.03142: as many steps as before, of one row each.
        """
        with torch.no_grad():
            wanted = self._guided(teacher, batch)
        weight = self._noise.min_snr_weights(batch.start)
        output = student(**batch.feeds)
        return Comparison(batch=batch, student=output, teacher=wanted, weight=weight)

    def _embedded(self, scale: Tensor) -> dict[str, Tensor]:
        """Return the student's input of the guidance scales (rows,), if it has one."""
        if not (width := self.plan.width):
            return {}
        return {"timestep_cond": embedded_scales(scale.tolist(), width)}

    def _teacher_step(self, batch: GuidedBatch, teacher: Network) -> Tensor:
        """Return latents at the end of a guided step of DDIM (Song et al. 2020, equation 12)."""
        output = self._guided(teacher, batch)
        clean = self._noise.clean(batch.noisy, output, batch.start)
        noise = self._noise.noise(batch.noisy, output, batch.start)
        return self._noise.noisy(clean, noise, batch.end)

    def _guided(self, teacher: Network, batch: GuidedBatch) -> Tensor:
        """Return the teacher's prediction with classifier-free guidance, in one pass."""
        feeds = {name: torch.cat([batch.free[name], row]) for name, row in batch.condition.items()}
        sample, times = torch.cat([batch.noisy] * 2), torch.cat([batch.start] * 2)
        free, conditioned = teacher(sample=sample, timestep=times, **feeds).chunk(2)
        scale = batch.scale.to(free).reshape(-1, *(1,) * (free.dim() - 1))
        guided = free + scale * (conditioned - free)
        return rescaled(guided, conditioned, self.plan.rescale) if self.plan.rescale else guided

    def _end(self, network: Network, feeds: Mapping[str, Tensor]) -> Tensor:
        """Return the end of the trajectories; at timestep 0 it is the latents themselves."""
        noisy, times = feeds["sample"], feeds["timestep"]
        clean = self._noise.clean(noisy, network(**feeds), times)
        scaled = self.plan.timestep_scaling * times.to(noisy)
        scaled = scaled.reshape(-1, *(1,) * (noisy.dim() - 1))
        total = scaled**2 + _SIGMA_DATA**2
        return _SIGMA_DATA**2 / total * noisy + scaled / total.sqrt() * clean


def embedded_scales(scales: Sequence[float], width: int) -> Tensor:
    """Return the embeddings of guidance scales, (rows, width): see guidance_embedding()."""
    return torch.cat([torch.from_numpy(guidance_embedding(row, width)) for row in scales])


def huber_loss(comparison: Comparison, width: float = 1e-3) -> Tensor:
    """Return the weighted pseudo-Huber loss between two predictions.

    Song & Dhariwal (2023), arXiv 2310.14189, section 3.3; by element, as diffusers' LCM training
    has it.
    """
    errors = comparison.student.float() - comparison.teacher.float()
    losses = ((errors.square() + width**2).sqrt() - width).flatten(1).mean(1)
    return (losses * comparison.weight).mean()


def add_guidance_input(unet: UNet2DConditionModel, width: int) -> None:
    """Give a UNet an input of the guidance scale, in place, which has no effect yet.

    Args:
        unet: with diffusers' embedding of timesteps.
        width: of the embedded scale.

    Raises:
        CheckpointError: it has one of another width.
    """
    present = unet.config.get("time_cond_proj_dim")
    if present not in (None, width):
        raise CheckpointError(f"the UNet takes a guidance scale of width {present}, not {width}")
    if present is None:
        first: Any = unet.time_embedding.linear_1
        projection = nn.Linear(width, first.in_features, bias=False)
        nn.init.zeros_(projection.weight)
        unet.time_embedding.cond_proj = projection.to(first.weight)
        unet.register_to_config(time_cond_proj_dim=width)


def lcm_config(config: Mapping[str, Any], plan: ConsistencyPlan) -> dict[str, Any]:
    """Return the scheduler_config.json of a student by consistency distillation.

    Args:
        config: that of its teacher.
        plan: of the distillation.

    Raises:
        CheckpointError: the teacher's schedule is malformed, or has no betas.
    """
    return {
        "_class_name": "LCMScheduler",
        **beta_config(config),
        "prediction_type": prediction_of(config),
        "original_inference_steps": plan.steps,
        "timestep_scaling": plan.timestep_scaling,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
