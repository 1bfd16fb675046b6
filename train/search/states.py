"""States of the teacher's own trajectories, on which students are compared with it.

A state is one call of the denoiser within a guided run at the deployed schedule: noisy latents, a
timestep and the conditioning, and the teacher's guided prediction for them. Noise added to clean
latents would be another distribution than the one that the loop meets.

States are weighted by how far an error of the prediction moves the latents. In a step of DDIM from
(alpha, sigma) to (alpha', sigma') the next latents are alpha' clean + sigma' noise with the noise
(x - alpha clean) / sigma. So an error d of the clean latent moves them by
(alpha' - sigma' alpha / sigma) d: in steps of v-prediction by the sine of the angle between the two
levels, times the error of v.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.loader import load
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.sampling.levels import NoiseLevel
from latentforge.runtime.sampling.prediction import Prediction, prediction_type
from latentforge.runtime.settings import Settings
from latentforge.runtime.tensor import Feeds

__all__ = ["State", "States", "record_states"]

Array = NDArray[np.float32]
Report = Callable[[int, int], None]
"""Called after each step with the number of steps done and their total."""

_MAX_POSITIONS = 1 << 12
"""Positions of the latents of all rows of a call: above it, images are drawn one by one."""

_FIELDS = ("rows", "scale", "image_scale", "rescale")  # of Guidance


@dataclass(frozen=True, kw_only=True)
class State:
    """Call of the denoiser within a guided run.

    Attributes:
        feeds: inputs by name, with ``rows`` of the guidance per image.
        prediction: the teacher's guided prediction, (images, channels, h, w).
        weight: of the error in this state; those of all states add up to 1.
    """

    feeds: Feeds
    prediction: Array
    weight: float


@dataclass(frozen=True, kw_only=True)
class States:
    """States of a teacher, and the guidance that mixes the rows of each."""

    states: tuple[State, ...]
    guidance: Guidance

    def __str__(self) -> str:
        rows, _, height, width = self.states[0].feeds["sample"].shape
        return f"{len(self.states)} states of {rows} rows of latents {height} x {width}"

    @property
    def digest(self) -> str:
        """Hash of the content, in hexadecimal."""
        digest = hashlib.sha256(repr(self.guidance).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def error(self, outputs: Iterator[Array]) -> float:
        """Return the relative squared error of guided predictions.

        Args:
            outputs: of a student's denoiser for each state, (rows, channels, h, w).

        Returns:
            The weighted sum over the states of mean((student - teacher)^2) / mean(teacher^2);
            infinite if a prediction is not finite.
        """
        total = 0.0
        for state, output in zip(self.states, outputs, strict=True):
            mixed = self.guidance.mix(output) if self.guidance.rows > 1 else output
            difference = np.mean(np.square(mixed - state.prediction, dtype=np.float64))
            total += state.weight * float(difference / _power(state.prediction))
        return total if math.isfinite(total) else math.inf

    def fewer(self, count: int) -> States:
        """Return at most ``count`` of the states, evenly over all, with weights that add up to 1.

        Each stands for the weight of those near it.
        """
        if count >= len(self.states):
            return self
        parts = np.array_split(np.arange(len(self.states)), count)
        kept = []
        for part in parts:
            middle = self.states[int(part[len(part) // 2])]
            weight = sum(self.states[int(index)].weight for index in part)
            kept.append(State(feeds=middle.feeds, prediction=middle.prediction, weight=weight))
        return States(states=tuple(kept), guidance=self.guidance)

    def write(self, path: Path) -> None:
        """Write the states to a .npz file."""
        guidance = [float(getattr(self.guidance, name)) for name in _FIELDS]
        arrays: Any = self._arrays()  # of any names, one of which could be savez()'s own argument
        with path.open("wb") as file:
            np.savez(file, guidance=np.array(guidance), **arrays)

    @classmethod
    def read(cls, path: Path) -> States:
        """Read states that write() wrote.

        Raises:
            OSError, ValueError: the file is missing or damaged.
        """
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                rows, *scales = (float(value) for value in file["guidance"])
                states = tuple(_read_state(file, index) for index in range(len(file["weights"])))
        except (BadZipFile, KeyError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        named = dict(zip(_FIELDS[1:], scales, strict=True))
        return cls(states=states, guidance=Guidance(rows=int(rows), **named))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {
            "weights": np.array([state.weight for state in self.states])
        }
        for index, state in enumerate(self.states):
            arrays[f"{index}/prediction"] = state.prediction
            arrays |= {f"{index}/feeds/{name}": array for name, array in state.feeds.items()}
        return arrays


def _read_state(file: Any, index: int) -> State:
    prefix = f"{index}/feeds/"
    names = [name for name in file.files if name.startswith(prefix)]
    return State(
        feeds={name.removeprefix(prefix): file[name] for name in names},
        prediction=file[f"{index}/prediction"],
        weight=float(file["weights"][index]),
    )


def _power(prediction: Array) -> float:
    return max(float(np.mean(np.square(prediction, dtype=np.float64))), 1e-12)


class _CallRecorder:
    """Session that keeps the calls since the last take()."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._calls: list[tuple[Feeds, Array]] = []

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        outputs = self._session.run(feeds)
        copies = {name: np.array(array) for name, array in feeds.items()}
        self._calls.append((copies, np.asarray(outputs["out_sample"], np.float32)))
        return outputs

    def take(self) -> list[tuple[Feeds, Array]]:
        calls, self._calls = self._calls, []
        return calls

    def layers(self) -> list[LayerTime]:
        return self._session.layers()

    def close(self) -> None:
        self._session.close()


def record_states(
    engines: Path,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    report: Report,
    go_on: Callable[[], bool] = lambda: True,
) -> States:
    """Draw images with the teacher's engines, and return a state of each step.

    Args:
        engines: that export wrote, with a whole denoiser.
        prompts: one image each, with its index as the seed.
        settings: of the deployed schedule, such as steps, where they differ from the defaults.
        report: called after each step.
        go_on: called before each further run; the rest of the prompts is left out when it returns
            False.

    Raises:
        SettingsError: there are no prompts, or the settings are invalid.
    """
    if not prompts:
        raise SettingsError("no prompts to draw by: give a file with one per line")
    recorders: list[_CallRecorder] = []

    def wrap(name: str, session: Session) -> Session:
        if name != "denoiser":
            return session
        recorders.append(_CallRecorder(session))
        return recorders[0]

    states: list[State] = []
    with load(engines, hashes=False, wrap_session=wrap, example_images=True) as pipeline:
        requests = _requests(pipeline, prompts, settings)
        total = sum(request.steps for request in requests)
        for request in requests:
            for state in _states_of(pipeline, request, recorders):
                states.append(state)
                report(len(states), max(total, len(states)))
    guidance = _guidance(requests[0], states[0])
    return States(states=_normalized(states, guidance), guidance=guidance)


def _requests(
    pipeline: Pipeline, prompts: Sequence[str], settings: Mapping[str, Any]
) -> list[Settings]:
    """Return requests for the prompts: several images in each if they are small."""
    given = {**settings, "unaccelerated": True}
    sample = pipeline.settings(prompts[0], **given)
    side = pipeline.manifest.latent.downscale
    positions = 2 * (sample.height // side) * (sample.width // side)
    size = max(1, _MAX_POSITIONS // positions)
    starts = range(0, len(prompts), size)
    chunks = ([*range(start, min(start + size, len(prompts)))] for start in starts)
    return [pipeline.settings([prompts[i] for i in c], **{"seed": c, **given}) for c in chunks]


def _states_of(
    pipeline: Pipeline, request: Settings, recorders: Sequence[_CallRecorder]
) -> Iterator[State]:
    """Yield a state of each step but those of several calls, of which it is the first."""
    steps: list[tuple[float, Feeds, Array]] = []
    for step in pipeline.steps(request):
        calls = recorders[0].take()
        if calls:
            steps.append((step.sigma, *calls[0]))
    ends = [sigma for sigma, *_ in steps[1:]] + [0.0]
    prediction = pipeline.manifest.prediction
    for (sigma, feeds, output), end in zip(steps, ends, strict=True):
        timestep = float(np.ravel(feeds["timestep"])[0])
        weight = _weight(sigma, end, timestep, prediction)
        yield State(feeds=feeds, prediction=output, weight=weight)


def _weight(start: float, end: float, timestep: float, prediction: Prediction) -> float:
    """Return the squared length that an error of 1 moves the latents by in a step of DDIM."""
    level = NoiseLevel(math.sqrt(max(0.0, 1 - start**2)), start, timestep)
    zero, one = np.zeros((1,), np.float32), np.ones((1,), np.float32)
    clean = float(prediction_type(prediction).clean(zero, one, level)[0])
    moved = math.sqrt(max(0.0, 1 - end**2)) - end * level.alpha / start
    return (moved * clean) ** 2


def _guidance(request: Settings, state: State) -> Guidance:
    return Guidance(
        rows=len(state.feeds["sample"]) // request.count,
        scale=request.guidance_scale,
        image_scale=request.image_guidance_scale,
        rescale=request.guidance_rescale,
    )


def _normalized(states: Sequence[State], guidance: Guidance) -> tuple[State, ...]:
    """Return the states with guided predictions and weights that add up to 1."""
    mixed = [guidance.mix(s.prediction) if guidance.rows > 1 else s.prediction for s in states]
    weights = [s.weight * _power(p) for s, p in zip(states, mixed, strict=True)]
    total = sum(weights) or 1.0
    return tuple(
        State(feeds=state.feeds, prediction=prediction, weight=weight / total)
        for state, prediction, weight in zip(states, mixed, weights, strict=True)
    )
