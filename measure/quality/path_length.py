"""Perceptual path length: how evenly images change between two prompts."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latentforge.measure.quality import intervals
from latentforge.measure.quality.inputs import MetricInputs
from latentforge.measure.quality.metrics import Distance
from latentforge.measure.results import ConfidenceInterval, Metric
from latentforge.runtime.conditioning.encode import ConditioningInputs
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import Settings

__all__ = ["path_length", "path_lengths", "path_metric"]

Array = NDArray[np.float32]

_EPSILON = 1e-2  # of the path; StyleGAN's 1e-4 is below the rounding of low precision
_KEPT = 1.0, 99.0  # percentiles, as in StyleGAN


def path_lengths(
    pipeline: Pipeline, requests: Sequence[Settings], distance: Distance, progress: Progress
) -> NDArray[np.float64]:
    """Return the path length at a random point between each prompt and the next, (requests,).

    Karras et al. (2019), arXiv 1812.04948, section 4.1, along the text embeddings: the distance of
    two images of equal initial noise, a hundredth of the path apart, over the square of that step.
    Noise and point follow from the request's seed.

    Args:
        pipeline: the engines.
        requests: one prompt and one image each; the last is followed by the first.
        distance: between images, such as LPIPS.
        progress: counts the requests.

    Raises:
        SettingsError: fewer than two requests.
    """
    if len(requests) < 2:
        raise SettingsError("ppl needs two images or more: generate more with --images")
    found = []
    for here, there in itertools.pairwise([*requests, requests[0]]):
        with progress.part("path length"):
            found.append(_length(pipeline, here, there, distance))
    return np.array(found)


def path_length(lengths: NDArray[np.float64], *, seed: int = 0) -> ConfidenceInterval:
    """Return the mean of the lengths between the 1st and the 99th percentile."""
    low, high = np.percentile(lengths, _KEPT, method="nearest")
    return intervals.mean(lengths[(lengths >= low) & (lengths <= high)], seed=seed)


def path_metric(name: str, lengths: NDArray[np.float64], inputs: MetricInputs) -> Metric:
    """Return the perceptual path length of a subject as a row of results.

    Args:
        name: of the subject.
        lengths: from path_lengths, one per request.
        inputs: with the distance that they were measured by.
    """
    interval = path_length(lengths)
    distance = "lpips" if "lpips" in inputs.distances else "perceptual"
    return Metric(
        name="ppl",
        subject=name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        level=interval.level,
        images=2 * len(lengths),
        better="lower",
        network=inputs.names[distance],
        note=f"median {np.median(lengths):.4g}; by {distance} distance",
    )


def _length(pipeline: Pipeline, here: Settings, there: Settings, distance: Distance) -> float:
    start, end = pipeline.encode(here), pipeline.encode(replace(there, seed=here.seed))
    place = np.random.default_rng(abs(here.seeds[0])).uniform(0, 1 - _EPSILON)
    a, b = (_pixels(pipeline, here, _between(start, end, t)) for t in (place, place + _EPSILON))
    return float(distance(a, b)[0]) / _EPSILON**2


def _between(start: ConditioningInputs, end: ConditioningInputs, t: float) -> ConditioningInputs:
    """Interpolate linearly; equal values stay exactly equal."""
    return {name: start[name] + np.float32(t) * (end[name] - start[name]) for name in start}


def _pixels(pipeline: Pipeline, settings: Settings, rows: ConditioningInputs) -> Array:
    """Return the image before it is rounded to 8 bits, which would hide so small a step."""
    latents = pipeline.run(settings, conditioning=rows).latents
    return pipeline.decode_pixels(latents).clip(-1, 1)
