"""Clean latents without pictures: those that a teacher drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from latentforge.runtime.errors import SettingsError
from latentforge.train.distill.clean_latents import CleanLatents
from latentforge.train.distill.training_noise import TrainingNoise
from latentforge.train.search.states import State, States

__all__ = ["drawn_latents"]


def drawn_latents(states: States, noise: TrainingNoise) -> CleanLatents:
    """Return the latents that a teacher drew: those that the last state of each run predicts.

    Args:
        states: of guided runs, in their order.
        noise: of the teacher.

    Raises:
        SettingsError: the denoiser takes an image, too; or the runs have no guidance, and so no
            inputs of the empty prompt.
    """
    first = states.states[0]
    if first.feeds["sample"].shape[1] != first.prediction.shape[1]:
        raise SettingsError(
            "the teacher takes an image beside the prompt: guidance cannot be folded into its "
            "student"
        )
    if states.guidance.rows != 2:
        raise SettingsError(
            "the teacher draws without classifier-free guidance, so there is none to learn: set a "
            "guidance_scale above 1"
        )
    rows = [_drawn(state, noise) for state in _last(states.states)]
    return CleanLatents(
        latents=torch.cat([row.latents for row in rows]),
        condition=_joined([row.condition for row in rows]),
        free=_joined([row.free for row in rows]),
    )


def _last(states: Sequence[State]) -> list[State]:
    """Return the states after which the timestep rises, as another run begins."""
    times = [float(np.ravel(state.feeds["timestep"])[0]) for state in states]
    ends = [*(after > time for time, after in pairwise(times)), True]
    return [state for state, is_last in zip(states, ends, strict=True) if is_last]


def _drawn(state: State, noise: TrainingNoise) -> CleanLatents:
    feeds = {name: torch.from_numpy(np.asarray(array)) for name, array in state.feeds.items()}
    noisy, time = feeds.pop("sample").chunk(2)[1], feeds.pop("timestep").reshape(-1)[:1]
    output = torch.from_numpy(state.prediction)
    halves = {name: value.chunk(2) for name, value in feeds.items()}
    return CleanLatents(
        latents=noise.clean(noisy, output, time.long().expand(len(noisy))),
        condition={name: half[1] for name, half in halves.items()},
        free={name: half[0] for name, half in halves.items()},
    )


def _joined(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
