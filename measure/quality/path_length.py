"""Perceptual path length: how evenly pictures change while one prompt turns into another."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.quality import intervals
from latentforge.measure.quality.metrics import Distance
from latentforge.measure.results import ConfidenceInterval
from latentforge.runtime.conditioning.encode import ConditioningInputs
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import Settings

__all__ = ["path_length", "path_lengths"]

Array = NDArray[np.float32]

_EPSILON = 1e-2  # of the way; StyleGAN's 1e-4 drowns in what low precision rounds
_KEPT = 1.0, 99.0  # percentiles, as StyleGAN has it


def path_lengths(
    pipeline: Pipeline, requests: Sequence[Settings], distance: Distance, progress: Progress
) -> NDArray[np.float64]:
    """The length at one random place of the way from each prompt to the next, (requests,).

    Karras et al. (2019), arXiv 1812.04948, section 4.1, along what the text encoders give: two
    pictures of one noise, a hundredth of the way apart, their distance over its square. The noise
    and the place follow from the seed of the request.

    Args:
        pipeline: the engines.
        requests: of one prompt and one image each; the last is followed by the first.
        distance: between pictures, such as LPIPS.
        progress: counts the requests.

    Raises:
        SettingsError: fewer than two requests.
    """
    if len(requests) < 2:
        raise SettingsError("ppl takes two images or more: make more with --images")
    found = []
    for here, there in itertools.pairwise([*requests, requests[0]]):
        with progress.part("path length"):
            found.append(_length(pipeline, here, there, distance))
    return np.array(found)


def path_length(lengths: NDArray[np.float64], *, seed: int = 0) -> ConfidenceInterval:
    """The mean length, of those between the 1st and the 99th percentile."""
    low, high = np.percentile(lengths, _KEPT, method="nearest")
    return intervals.mean(lengths[(lengths >= low) & (lengths <= high)], seed=seed)


def _length(pipeline: Pipeline, here: Settings, there: Settings, distance: Distance) -> float:
    start, end = pipeline.encode(here), pipeline.encode(replace(there, seed=here.seed))
    place = np.random.default_rng(abs(here.seed)).uniform(0, 1 - _EPSILON)
    a, b = (_pixels(pipeline, here, _between(start, end, t)) for t in (place, place + _EPSILON))
    return float(distance(a, b)[0]) / _EPSILON**2


def _between(start: ConditioningInputs, end: ConditioningInputs, t: float) -> ConditioningInputs:
    """A straight line, and exactly what both have in common where they agree."""
    return {name: start[name] + np.float32(t) * (end[name] - start[name]) for name in start}


def _pixels(pipeline: Pipeline, settings: Settings, rows: ConditioningInputs) -> Array:
    """The picture before it is rounded to 8 bits, which would hide so small a step."""
    latents = pipeline.run(settings, rows=rows).latents
    scaled = latents / np.float32(pipeline.manifest.latent.scaling_factor)
    return pipeline.engines["vae_decoder"].run({"latent_sample": scaled})["sample"].clip(-1, 1)
