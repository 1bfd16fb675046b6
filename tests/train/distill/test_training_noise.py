"""Noise of training against diffusers' schedulers."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from tiny import TINY

from latentforge.export.schedulers import diffusers_scheduler
from latentforge.runtime.errors import CheckpointError
from latentforge.train.distill.training_noise import TrainingNoise, beta_config, zero_snr_config

PREDICTIONS = ("epsilon", "v_prediction", "sample")
TIMES = torch.tensor([0, 1, 250, 500, 998, 999])


def config(prediction: str = "epsilon", **options: Any) -> dict[str, Any]:
    """Return the configuration of a scheduler of diffusers."""
    return {"_class_name": "DDIMScheduler", "prediction_type": prediction, **options}


def latents(seed: int) -> torch.Tensor:
    """Return random latents, one for each of TIMES."""
    return torch.randn(len(TIMES), 4, 3, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noisy_latents_and_targets_are_those_of_diffusers(prediction: str) -> None:
    noise, clean, added = TrainingNoise.of(config(prediction)), latents(0), latents(1)
    scheduler: Any = DDIMScheduler.from_config(config(prediction))
    noisy = noise.noisy(clean, added, TIMES)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, added, TIMES))
    velocity = scheduler.get_velocity(clean, added, TIMES)
    expected = {"epsilon": added, "v_prediction": velocity, "sample": clean}[prediction]
    torch.testing.assert_close(noise.target(clean, added, TIMES), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_output_gives_clean_latents_and_noise_back(prediction: str) -> None:
    noise, clean, added = TrainingNoise.of(config(prediction)), latents(0), latents(1)
    noisy, output = noise.noisy(clean, added, TIMES), noise.target(clean, added, TIMES)
    torch.testing.assert_close(noise.clean(noisy, output, TIMES), clean, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(noise.noise(noisy, output, TIMES), added, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_equal_errors_of_the_clean_latent(prediction: str) -> None:
    """A small error of the output, weighted, is the error of the clean latent, weighted."""
    noise, output, noisy = TrainingNoise.of(config(prediction)), latents(0), latents(1)
    errors = noise.clean(noisy, output + 1, TIMES) - noise.clean(noisy, output, TIMES)
    squares = noise.squares[TIMES]
    expected = (squares / (1 - squares)).clamp(max=5.0) * errors[:, 0, 0, 0] ** 2
    torch.testing.assert_close(noise.min_snr_weights(TIMES), expected, rtol=1e-2, atol=1e-6)


def test_the_timestep_of_pure_noise_is_trained() -> None:
    noise = TrainingNoise.of(zero_snr_config(config()))
    assert noise.ends_in_noise and noise.prediction == "v_prediction"
    assert noise.min_snr_weights(TIMES)[-1] == 1


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace"])
def test_betas_are_those_of_the_teacher_in_any_class(kind: str) -> None:
    teacher = {"_class_name": "DDPMScheduler", "beta_schedule": kind}  # of its own defaults
    before = diffusers_scheduler("DDPMScheduler", teacher).alphas_cumprod
    after = LCMScheduler.from_config(beta_config(teacher)).alphas_cumprod
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-7)
    rescaled: Any = DDIMScheduler.from_config(zero_snr_config(teacher))
    assert rescaled.alphas_cumprod[-1] == 0 and rescaled.config.timestep_spacing == "trailing"


def test_equal_levels_of_another_schedule() -> None:
    teacher = TrainingNoise.of({"_class_name": "PNDMScheduler", **TINY["sd"].scheduler[1]})
    student = TrainingNoise.of(zero_snr_config({"_class_name": "DDIMScheduler"}))
    times, reached = teacher.equal_times(student, TIMES)
    assert reached.tolist() == [True, True, True, True, False, False]  # nearly pure noise
    assert times[0] == 0  # less noise than at the teacher's first
    wanted, inside = student.squares[TIMES[2:4]].sqrt(), times[2:4]
    below = teacher.squares[inside.floor().long()].sqrt()
    above = teacher.squares[inside.ceil().long()].sqrt()
    assert ((above <= wanted + 1e-4) & (wanted <= below + 1e-4)).all()


def test_equal_schedules_have_equal_times() -> None:
    noise = TrainingNoise.of(config())
    times, reached = noise.equal_times(noise, TIMES)
    torch.testing.assert_close(times, TIMES.float(), atol=1e-3, rtol=0)
    assert reached.all()


def test_edm_is_refused_by_name() -> None:
    edm = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}
    with pytest.raises(CheckpointError, match="EDM schedule"):
        TrainingNoise.of(edm)
