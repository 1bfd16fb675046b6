"""Clean latents from the states of a teacher's runs."""

import numpy as np
import pytest
import torch

from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.errors import SettingsError
from latentforge.train.distill.drawn_latents import drawn_latents
from latentforge.train.distill.training_noise import TrainingNoise
from latentforge.train.search.states import State, States

NOISE = TrainingNoise.of({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"})


def states(rows: int = 2) -> States:
    """Return two runs of two images, whose last predictions are perfect."""
    found = []
    for run in range(2):
        clean = torch.tensor([float(run), run + 0.5]).reshape(2, 1, 1, 1).expand(2, 4, 3, 3)
        for time in (900, 400, 20):
            added = torch.randn(clean.shape)
            noisy = NOISE.noisy(clean, added, torch.tensor([time, time])).numpy()
            prompts = np.arange(2 * rows, dtype=np.float32).reshape(-1, 1, 1) + 10 * run
            feeds = {
                "sample": np.concatenate([noisy] * rows),
                "timestep": np.array([time], np.float32),
                "encoder_hidden_states": prompts,
            }
            found.append(State(feeds=feeds, prediction=added.numpy(), weight=1 / 6))
    return States(states=tuple(found), guidance=Guidance(rows=rows, scale=2.0))


def test_the_last_state_of_each_run_says_where_it_ended() -> None:
    drawn = drawn_latents(states(), NOISE)
    means = drawn.latents.mean((1, 2, 3)).tolist()
    assert means == pytest.approx([0.0, 0.5, 1.0, 1.5], abs=1e-4)
    assert drawn.condition["encoder_hidden_states"].flatten().tolist() == [2, 3, 12, 13]
    assert drawn.free["encoder_hidden_states"].flatten().tolist() == [0, 1, 10, 11]


def test_runs_without_guidance_are_refused() -> None:
    with pytest.raises(SettingsError, match="guidance_scale above 1"):
        drawn_latents(states(rows=1), NOISE)
