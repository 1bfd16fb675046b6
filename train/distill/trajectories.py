"""Batches without data: states of the teacher's own guided runs, as search/states.py records them.

Half of what a deployed loop asks of a denoiser are rows that only guidance sees, so a row of any
prompt is compared by itself, and in a share of the batches the guided predictions are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentforge.runtime.errors import SettingsError
from latentforge.train.distill.batch import TrainingBatch
from latentforge.train.search.states import State, States

__all__ = ["TrajectorySource"]


class TrajectorySource:
    """Source of random states; its batches depend on the generator alone."""

    def __init__(self, states: States, guided: float) -> None:
        """Bind states.

        Args:
            states: of the teacher.
            guided: share of batches in which guided predictions are compared.

        Raises:
            SettingsError: there are no states.
        """
        if not states.states:
            raise SettingsError("no states to train on: give prompts, and steps above 0")
        self._states, self._guidance = states.states, states.guidance
        self._guided = guided if states.guidance.rows > 1 else 0.0
        self._items = [(s, i) for s in self._states for i in range(len(s.prediction))]

    def draw(self, rows: int, generator: torch.Generator) -> TrainingBatch:
        """Return a batch of at most so many rows, and at least one image's."""
        every = self._guidance.rows
        if torch.rand((), generator=generator).item() < self._guided:
            items = self._pick(max(1, rows // every), generator)
            chosen = [(item, row) for row in range(every) for item in items]
            return TrainingBatch(feeds=_feeds(chosen, every), guidance=self._guidance)
        items = self._pick(rows, generator)
        numbers = torch.randint(every, (rows,), generator=generator).tolist()
        return TrainingBatch(feeds=_feeds(list(zip(items, numbers, strict=True)), every))

    def state(self) -> dict[str, Any]:
        """Return nothing: there is no order."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""

    def _pick(self, count: int, generator: torch.Generator) -> list[tuple[State, int]]:
        chosen = torch.randint(len(self._items), (count,), generator=generator)
        return [self._items[index] for index in chosen.tolist()]


def _feeds(chosen: list[tuple[tuple[State, int], int]], every: int) -> dict[str, Tensor]:
    """Return the inputs of (state, image) items at rows of the guidance, stacked."""
    names = chosen[0][0][0].feeds
    rows = {name: [_row(item, name, row, every) for item, row in chosen] for name in names}
    return {name: torch.from_numpy(np.stack(values)) for name, values in rows.items()}


def _row(item: tuple[State, int], name: str, row: int, every: int) -> Any:
    state, image = item
    array = np.asarray(state.feeds[name])
    if name == "timestep":
        return array.reshape(-1)[0]
    return array[row * (len(array) // every) + image]
