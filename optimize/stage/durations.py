"""Durations of an optimization: measured on one step, and counted for every image and call.

The one place that knows how often images are drawn and graphs are run. sizing.py reduces these
numbers to a budget, and build.py adds the stages before and after.
"""

import time
from dataclasses import dataclass

from latentforge.optimize.graph import layers
from latentforge.optimize.graph_io import DENOISER, load_graph
from latentforge.optimize.recipe import Recipe
from latentforge.optimize.stage.job import OptimizeJob
from latentforge.runtime.loader import load
from latentforge.runtime.progress import Progress

__all__ = ["ImageCost", "durations", "measure_cost"]

_REWRITE_SECONDS = 9e-9  # per byte of weights: read, rewritten, written and hashed
_INT8_RUNS = 4.0  # of the graph for each call: channel maxima, and ranges with their histogram
_BLOCK_RUNS = 60.0  # residual branches, each left out once for each call
_SCORE_RUNS = 1.5
_PROFILED_RUNS = 16.0  # of both graphs together, to time layers


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """Seconds of one image by its parts.

    Attributes:
        load: of the engines.
        encode: of the prompt.
        step: one denoising step, with guidance if the settings have it.
        decode: of the image.
        layers: of the denoiser, if a recipe measures their sensitivity.
    """

    load: float
    encode: float
    step: float
    decode: float
    layers: int = 0

    def image(self, steps: int) -> float:
        """Return the seconds of an image of so many steps, by loaded engines."""
        return self.encode + steps * self.step + self.decode


def measure_cost(job: OptimizeJob, progress: Progress) -> ImageCost:
    """Measure the parts of an image of the source: the first step of a run, and its decoding."""
    with progress.part("measuring one step"):
        start = time.perf_counter()
        with load(job.source, hashes=False, example_images=True) as pipeline:
            loaded = time.perf_counter()
            steps = pipeline.stream(job.prompts[0], **{"seed": 0, **job.request.settings})
            timings = next(steps).result().timings
            seconds = timings.seconds
    encode, decode = (seconds.get(name, 0.0) for name in ("text_encoder", "vae_decoder"))
    return ImageCost(
        load=loaded - start,
        encode=encode,
        step=max(timings.total - encode - decode, 1e-6),
        decode=decode,
        layers=_layer_count(job),
    )


def durations(job: OptimizeJob, cost: ImageCost) -> dict[str, float]:
    """Return the seconds of a job by part."""
    gate, calibration = (len(prompts) for prompts in job.prompt_sets)
    image, recipes = cost.image(job.steps), list(job.recipes.values())
    parts = {
        "references": cost.load + gate * image,
        "calibration": cost.load + calibration * image if calibration else 0.0,
        "sensitivity": sum(_sensitivity_runs(recipe, cost.layers) for recipe in recipes)
        * cost.step,
        "rewriting": len(recipes) * _REWRITE_SECONDS * job.manifest.size
        + sum(_calibrated_runs(recipe) for recipe in recipes) * cost.step,
        "gate": len(recipes) * (cost.load + gate * image),
        "timing": _timed_seconds(job, cost),
    }
    return {name: seconds for name, seconds in parts.items() if seconds}


def _timed_seconds(job: OptimizeJob, cost: ImageCost) -> float:
    """Return the seconds of timing: one image to warm up and the counted ones, of each engine."""
    if not job.is_timed:
        return 0.0
    images = (job.request.pairs + 1) * cost.image(job.timed_steps)
    return (1 + len(job.recipes)) * (cost.load + images)


def _calibrated_runs(recipe: Recipe) -> float:
    """Return the denoiser runs that ranges and pruning scores take."""
    runs = _INT8_RUNS if recipe.precision_of(DENOISER) == "int8" else 0.0
    if recipe.prune is not None:
        runs += _BLOCK_RUNS * (recipe.prune.blocks > 0)
        runs += _SCORE_RUNS * ((recipe.prune.channels > 0) + (recipe.prune.heads > 0))
    if recipe.sparsity is not None and recipe.sparsity.score == "activation":
        runs += _SCORE_RUNS
    return runs * recipe.calibration.samples


def _sensitivity_runs(recipe: Recipe, layer_count: int) -> float:
    """Return the denoiser runs that the sensitivity of layers takes."""
    if not recipe.measures_layers:
        return 0.0
    assert recipe.sensitivity is not None
    calibrated = 2 * _INT8_RUNS * recipe.calibration.samples
    return (layer_count + 1) * recipe.sensitivity.steps + calibrated + _PROFILED_RUNS


def _layer_count(job: OptimizeJob) -> int:
    """Return the number of the denoiser's layers, if a recipe measures their sensitivity."""
    if not any(recipe.measures_layers for recipe in job.recipes.values()):
        return 0
    model = load_graph(DENOISER, job.manifest.components[DENOISER], job.source)
    return len(list(layers(model.graph)))
