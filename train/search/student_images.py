"""Images of students without training: the deployed loop, with their denoiser in torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.measure.quality.intervals import LEVEL, resample_counts
from latentforge.measure.quality.metrics import compare_pairs
from latentforge.measure.results import ConfidenceInterval
from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.loader import load
from latentforge.runtime.tensor import Feeds
from latentforge.train.search.states import State
from latentforge.train.search.student_errors import StudentErrors

__all__ = ["ImageErrors", "StudentImages", "error_ratio"]

Array = NDArray[np.float64]

_SEED = 10_000
"""Seed of the first image, above those of the states that students are chosen on."""

_DENOISER = "denoiser"


@dataclass(frozen=True, kw_only=True)
class ImageErrors:
    """Images of a student, and how far each is from the teacher's of the same prompt and seed.

    Attributes:
        images: one per prompt.
        latents: (images,) squared differences of the final latents, relative to the teacher's.
        pixels: (images,) mean squared differences of the images, whose pixels are in -1..1.
    """

    images: Sequence[Image.Image]
    latents: Array
    pixels: Array


class StudentImages:
    """Function from a structure to the images of its student, with inherited weights."""

    def __init__(
        self,
        engines: Path,
        errors: StudentErrors,
        prompts: Sequence[str],
        settings: Mapping[str, Any],
    ) -> None:
        """Bind a teacher.

        Args:
            engines: of the teacher, by export; all but the denoiser are used.
            errors: of its students, which have the denoiser in torch.
            prompts: of the images, one or more.
            settings: of the deployed schedule, such as steps, where they differ from the defaults.
        """
        self._engines, self._errors = engines, errors
        self._prompts, self._settings = list(prompts), settings
        self._teacher: tuple[Array, Sequence[Image.Image]] | None = None

    def __call__(self, structure: SearchedStructure) -> ImageErrors:
        """Draw the images of a structure and compare them with the teacher's."""
        if self._teacher is None:
            self._teacher = self._drawn(SearchedStructure(choices={}))
        reference, expected = self._teacher
        latents, images = self._drawn(structure) if structure.choices else self._teacher
        axes = (1, 2, 3)
        power = np.maximum(np.square(reference).mean(axis=axes), 1e-12)
        pixels = compare_pairs(expected, images, {})["error"]
        distances = np.square(latents - reference).mean(axis=axes) / power
        return ImageErrors(images=images, latents=distances, pixels=pixels)

    def _drawn(self, structure: SearchedStructure) -> tuple[Array, Sequence[Image.Image]]:
        """Return the final latents and the images of a structure."""
        with self._errors.student(structure) as run, _pipeline(self._engines, run) as pipeline:
            seeds = [_SEED + index for index in range(len(self._prompts))]
            result = pipeline(
                self._prompts, **{"seed": seeds, "unaccelerated": True, **self._settings}
            )
        return np.asarray(result.latents, np.float64), result.images


@contextmanager
def _pipeline(engines: Path, denoise: Any) -> Iterator[Any]:
    """Yield the teacher's pipeline with another denoiser."""

    def wrap(name: str, session: Session) -> Session:
        if name != _DENOISER:
            return session
        session.close()
        return _TorchDenoiser(denoise)

    with load(engines, hashes=False, wrap_session=wrap, example_images=True) as pipeline:
        yield pipeline


class _TorchDenoiser:
    """Session of a denoiser that runs in torch."""

    def __init__(self, denoise: Any) -> None:
        self._denoise = denoise

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        state = State(feeds=dict(feeds), prediction=np.zeros(0, np.float32), weight=0.0)
        return {"out_sample": self._denoise(state)}

    def layers(self) -> list[LayerTime]:
        return []

    def close(self) -> None:
        """Keep the network, which others use."""


def error_ratio(first: Array, second: Array) -> ConfidenceInterval:
    """Return the ratio of the mean errors of equal images, with percentiles of resampled ones.

    Args:
        first: (images,) errors.
        second: (images,) errors of others for the same prompts and seeds.
    """
    counts = resample_counts(len(first))
    value = float(first.mean() / max(second.mean(), 1e-300))
    if len(first) < 2:
        return ConfidenceInterval(value=value)
    low, high = np.percentile((counts @ first) / np.maximum(counts @ second, 1e-300), (2.5, 97.5))
    return ConfidenceInterval(value=value, low=float(low), high=float(high), level=LEVEL)
