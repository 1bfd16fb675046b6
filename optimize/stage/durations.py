"""Durations of an optimization: measured on one step, and counted for every image and call.

The one place that knows how often images are drawn and graphs are run. sizing.py reduces these
numbers to a budget, and build.py adds the stages before and after.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from latentforge.optimize.graph import layers
from latentforge.optimize.graph_io import DENOISER, load_graph
from latentforge.optimize.recipe import Recipe
from latentforge.optimize.stage.job import OptimizeJob
from latentforge.optimize.targets import Target
from latentforge.runtime.loader import load
from latentforge.runtime.progress import Progress

__all__ = ["ImageCost", "RunSize", "Workload", "durations", "expected_speedup", "measure_cost"]

_REWRITE_SECONDS = 9e-9  # per byte of weights: read, rewritten, written and hashed
_INT8_RUNS = 4.0  # of the graph for each call: channel maxima, and ranges with their histogram
_BLOCK_RUNS = 60.0  # residual branches, each left out once for each call
_SCORE_RUNS = 1.5
_KERNEL_SPEEDUP = 1.6  # of latentforge's own CPU kernels: 1.5 to 2.2 were measured
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

    def faster(self, speedup: float) -> "ImageCost":
        """Return the cost with engines that run faster by a factor."""
        encode, step, decode = (s / speedup for s in (self.encode, self.step, self.decode))
        return replace(self, encode=encode, step=step, decode=decode)


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


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """Numbers that decide how long an optimization takes; see OptimizeRequest and Recipe.

    Attributes:
        steps: of the images of gate and calibration.
        images: of the gate.
        prompts: of the calibration; 0 without one.
        samples: calls of the calibration; 0 without one.
        sensitivity_steps: of the run that is repeated for each layer; 0 without one.
        repeats: timed pairs.
        timed_steps: of the timed images.
    """

    steps: int
    images: int
    prompts: int
    samples: int
    sensitivity_steps: int
    repeats: int
    timed_steps: int

    @classmethod
    def of(cls, job: OptimizeJob) -> "RunSize":
        """Return the size of a job."""
        size = cls.wanted(list(job.recipes.values()), job.steps, job.request.pairs)
        timed = job.timed_steps if job.is_timed else 0
        return replace(size, repeats=size.repeats if job.is_timed else 0, timed_steps=timed)

    @classmethod
    def wanted(cls, recipes: Sequence[Recipe], steps: int, repeats: int) -> "RunSize":
        """Return the size that recipes want, with images of so many steps and timed pairs."""
        calibrated = [recipe.calibration for recipe in recipes if recipe.needs_calibration]
        measured = [r.sensitivity.steps for r in recipes if r.measures_layers and r.sensitivity]
        return cls(
            steps=steps,
            images=max(recipe.gate.images for recipe in recipes),
            prompts=max((calibration.prompts for calibration in calibrated), default=0),
            samples=max((calibration.samples for calibration in calibrated), default=0),
            sensitivity_steps=max(measured, default=0),
            repeats=repeats,
            timed_steps=steps if repeats else 0,
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Recipes, weights and run size that decide how long an optimization takes.

    Attributes:
        recipes: to carry out.
        size: numbers of images and calls.
        bytes: of the weights in fp32.
        speedup: expected of the result's steps.
    """

    recipes: Sequence[Recipe]
    size: RunSize
    bytes: int
    speedup: float

    @classmethod
    def of(cls, job: OptimizeJob) -> "Workload":
        """Return the work of a job."""
        return cls(
            recipes=list(job.recipes.values()),
            size=RunSize.of(job),
            bytes=job.manifest.size,
            speedup=expected_speedup(job.target),
        )


def expected_speedup(target: Target) -> float:
    """Return the speedup to expect of a target's engines over the exported ones on this machine."""
    return _KERNEL_SPEEDUP if target.post_partition_passes else 1.0


def durations(work: Workload, cost: ImageCost) -> dict[str, float]:
    """Return the seconds of an optimization by part."""
    size, count = work.size, len(work.recipes)
    image, result = cost.image(size.steps), cost.faster(work.speedup)
    calibrated = sum(map(_calibrated_runs, work.recipes)) * cost.step
    parts = {
        "references": cost.load + size.images * image,
        "calibration": cost.load + size.prompts * image if size.prompts else 0.0,
        "sensitivity": sum(_sensitivity_runs(r, cost.layers) for r in work.recipes) * cost.step,
        "rewriting": count * _REWRITE_SECONDS * work.bytes + calibrated,
        "gate": count * (result.load + size.images * result.image(size.steps)),
        "timing": _timed(size, cost) + count * _timed(size, result),
    }
    return {name: seconds for name, seconds in parts.items() if seconds}


def _timed(size: RunSize, cost: ImageCost) -> float:
    """Return the seconds to time engines: one image to warm up, and the counted ones."""
    images = (size.repeats + 1) * cost.image(size.timed_steps)
    return cost.load + images if size.repeats else 0.0


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
