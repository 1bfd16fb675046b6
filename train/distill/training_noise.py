"""Noise that a denoiser is trained with, and conversions between predictions, in torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from latentforge.export.schedulers import prediction_of, schedule_of
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.sampling.prediction import Prediction
from latentforge.runtime.sampling.schedule import Schedule

__all__ = ["TrainingNoise", "beta_config", "discrete_schedule", "zero_snr_config"]

_NAMED = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Formulas of betas that every scheduler of diffusers knows."""

_ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@dataclass(frozen=True, kw_only=True)
class TrainingNoise:
    """Noise levels by timestep: x = alpha * clean + sigma * noise, with alpha^2 + sigma^2 = 1.

    Attributes:
        squares: alpha^2 of each timestep, (steps,) in float32.
        prediction: epsilon, v_prediction or sample.
    """

    squares: Tensor
    prediction: Prediction

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TrainingNoise:
        """Return the noise of a scheduler_config.json.

        Raises:
            CheckpointError: its schedule is malformed, or has no timesteps, as that of EDM.
        """
        squares = torch.from_numpy(discrete_schedule(config).alphas_cumprod.copy())
        return cls(squares=squares, prediction=prediction_of(config))

    @property
    def steps(self) -> int:
        """Number of timesteps."""
        return len(self.squares)

    @property
    def ends_in_noise(self) -> bool:
        """True at zero terminal SNR (Lin et al. 2023, arXiv 2305.08891)."""
        return bool(self.squares[-1] == 0)

    def levels(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of ``times`` (batch,), as (batch, 1, ...) of the kind of like."""
        squares = self.squares[times.cpu().long()].double()
        shape = (-1, *(1,) * (like.dim() - 1))
        alphas, sigmas = squares.sqrt(), (1 - squares).sqrt()
        return alphas.reshape(shape).to(like), sigmas.reshape(shape).to(like)

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return noisy latents (batch, channels, h, w) at ``times`` (batch,)."""
        alpha, sigma = self.levels(times, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return the output that a perfect denoiser would have."""
        alpha, sigma = self.levels(times, clean)
        match self.prediction:
            case "epsilon":
                return noise
            case "v_prediction":
                return alpha * noise - sigma * clean
            case _:
                return clean

    def clean(self, noisy: Tensor, output: Tensor, times: Tensor) -> Tensor:
        """Return the clean latents that an output predicts."""
        alpha, sigma = self.levels(times, noisy)
        match self.prediction:
            case "epsilon":
                return (noisy - sigma * output) / alpha
            case "v_prediction":
                return alpha * noisy - sigma * output
            case _:
                return output

    def noise(self, noisy: Tensor, output: Tensor, times: Tensor) -> Tensor:
        """Return the noise that an output predicts."""
        alpha, sigma = self.levels(times, noisy)
        match self.prediction:
            case "epsilon":
                return output
            case "v_prediction":
                return sigma * noisy + alpha * output
            case _:
                return (noisy - alpha * output) / sigma

    def min_snr_weights(self, times: Tensor, gamma: float = 5.0) -> Tensor:
        """Return weights (batch,) of squared errors of the output: Hang et al. (2023).

        The error of the clean latent has the weight min(SNR, gamma) (arXiv 2303.09556, section
        3.4). Where the schedule ends at zero SNR, it has 1 at least (Salimans & Ho 2022, section
        4), or the timestep that sampling starts with would not be trained.
        """
        squares = self.squares[times.cpu().long()].double()
        snr = squares / (1 - squares)
        clean = snr.clamp(1.0 if self.ends_in_noise else 0.0, gamma)
        match self.prediction:
            case "epsilon":
                weights = clean / snr
            case "v_prediction":
                weights = clean / (snr + 1)
            case _:
                weights = clean
        return weights.to(times.device, torch.float32)

    def equal_times(self, other: TrainingNoise, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return timesteps of this noise at which the SNR is that of ``times`` of another.

        Both have alpha^2 + sigma^2 = 1, so that latents are equally noisy there, too.

        Returns:
            Fractional timesteps (batch,) in float32, interpolated in the angle between alpha and
            sigma, and 0 for less noise than there is at 0; and a mask (batch,), False where this
            noise does not reach the level.
        """
        own, wanted = _angles(self.squares), _angles(other.squares[times.cpu().long()])
        after = torch.searchsorted(own, wanted).clamp(1, self.steps - 1)
        low, high = own[after - 1], own[after]
        found = (after - 1 + (wanted - low) / (high - low)).clamp(0, self.steps - 1)
        reached = wanted <= own[-1] + 1e-6
        return found.float().to(times.device), reached.to(times.device)


def _angles(squares: Tensor) -> Tensor:
    """Return atan2(sigma, alpha) in float64, which rises with the timestep."""
    squares = squares.double()
    return torch.atan2((1 - squares).sqrt(), squares.sqrt())


def beta_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a scheduler_config.json that give its betas, for any class of diffusers.

    Absent keys have the defaults of the class that the file names, which other classes may not
    share.

    Raises:
        CheckpointError: the schedule is malformed, or has no betas.
    """
    schedule = discrete_schedule(config)
    keys = {
        "num_train_timesteps": schedule.train_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }
    if schedule.beta_kind in _NAMED:
        return {**keys, "beta_schedule": schedule.beta_kind}
    squares = replace(schedule, zero_terminal_snr=False).alphas_cumprod.astype(float)
    ratios = [squares[0], *(squares[1:] / squares[:-1])]
    return {**keys, "trained_betas": [float(1 - ratio) for ratio in ratios]}


def discrete_schedule(config: Mapping[str, Any]) -> Schedule:
    """Return the schedule of a scheduler_config.json.

    Raises:
        CheckpointError: it is malformed, or has no timesteps, as that of EDM.
    """
    schedule = schedule_of(config)
    if not isinstance(schedule, Schedule):
        raise CheckpointError(
            "scheduler_config.json: an EDM schedule has no timesteps to train at: name a "
            "teacher with a schedule of betas"
        )
    return schedule


def zero_snr_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler_config.json for a student of v-prediction that starts in pure noise.

    The betas are those of the teacher, rescaled (Lin et al. 2023, arXiv 2305.08891, algorithm 1);
    sampling starts at the last timestep (section 3.3).

    Args:
        config: the teacher's scheduler_config.json.

    Raises:
        CheckpointError: its schedule is malformed, or has no betas.
    """
    return {"_class_name": "DDIMScheduler", **beta_config(config), **_ZERO_SNR}
