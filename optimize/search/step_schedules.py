"""Samplers and timesteps for few steps, searched once per number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.optimize.search.timesteps import TimestepResult, Timesteps, search_timesteps
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.sampling.schedule import Schedule
from latentforge.runtime.settings import Settings

__all__ = ["StepSchedules"]

_IMAGES = 4  # whose final latents are compared
_REFERENCE_SAMPLER = "dpmpp_2m"  # of second order, and it supports every schedule
_MIN_REFERENCE_STEPS = 50

Array = NDArray[np.float32]


class StepSchedules:
    """Sampler and timesteps for each number of steps: those nearest to a long schedule."""

    def __init__(
        self, load: Callable[[], Pipeline], requests: Sequence[Settings], *, moves: int
    ) -> None:
        """Prepare a search.

        Args:
            load: returns the pipeline of the unaccelerated engines; called only for a search.
            requests: unaccelerated requests of one image; the first few are used.
            moves: see search_timesteps().
        """
        self._load = load
        self._requests = requests[:_IMAGES]
        self._moves = moves
        self._reference: list[Array] = []
        self._results: dict[int, TimestepResult] = {}

    def find(self, steps: int) -> tuple[str, Timesteps]:
        """Return the sampler and the timesteps for a number of steps.

        For the default number of steps this is the default sampler with its own timesteps, which
        an empty tuple stands for.
        """
        default = self._requests[0]
        if steps == default.steps:
            return default.sampler, ()
        if steps not in self._results:
            schedule = self._load().manifest.schedule
            if not isinstance(schedule, Schedule):
                raise SettingsError(
                    "timesteps cannot be searched on an EDM schedule: build without --fast"
                )
            self._results[steps] = search_timesteps(
                schedule, steps, self._distance, moves=self._moves
            )
        return self._results[steps].sampler, self._results[steps].timesteps

    def record(self) -> list[dict[str, Any]]:
        """Return the results for the history of a manifest, by number of steps."""
        return [
            {"steps": steps, **asdict(result), "timesteps": list(result.timesteps)}
            for steps, result in sorted(self._results.items())
        ]

    def _distance(self, sampler: str, timesteps: Timesteps) -> float:
        """Return the mean squared distance of final latents to those of many steps."""
        pipeline = self._load()
        if not self._reference:
            steps = max(_MIN_REFERENCE_STEPS, 2 * self._requests[0].steps)
            self._reference = [
                _latents(pipeline, request, sampler=_REFERENCE_SAMPLER, steps=steps)
                for request in self._requests
            ]
        latents = [
            _latents(pipeline, request, sampler=sampler, timesteps=timesteps)
            for request in self._requests
        ]
        return float(np.square(np.stack(latents) - np.stack(self._reference)).mean())


def _latents(pipeline: Pipeline, request: Settings, **schedule: Any) -> Array:
    """Return the final latents of a request by another schedule, without decoding them."""
    *_, last = pipeline.stream(request.prompts[0], seed=request.seed, **schedule)
    return last.latents
