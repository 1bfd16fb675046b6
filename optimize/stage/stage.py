"""The optimize stage: an engine directory in, an optimized one out, behind a quality gate."""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from latentforge.measure.bench.protocol import Participant
from latentforge.measure.results import BenchResult
from latentforge.optimize.graph_io import DENOISER
from latentforge.optimize.recording import RecordingRequest
from latentforge.optimize.references import recorded
from latentforge.optimize.stage.candidate import Origin, RecipeCandidate, make
from latentforge.optimize.stage.durations import measure_cost
from latentforge.optimize.stage.job import STAGE, OptimizeJob, plan
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.stage.sizing import fit
from latentforge.optimize.timing import (
    FreeMemoryError,
    fastest,
    rounded,
    speedup_figures,
    time_engines,
)
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.disk import check_space
from latentforge.runtime.errors import GateError, TargetError
from latentforge.runtime.files import (
    check_target,
    scratch_folder,
    staged_directory,
)
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import CalibrationSchedule, Manifest, Stage
from latentforge.runtime.progress import Progress

__all__ = ["optimize", "optimize_into"]

Results = Mapping[str, BenchResult]
"""Timing of the source and of the candidates, by name."""

_INPUT = "input"  # name of the source among the timed engines
_SPACE = 1.1  # bytes on disk as a multiple of the source's: results are hardly larger
_QUALITY = ("max_relative_error", "psnr", "psnr_worst", "ssim", "perceptual", "latents_psnr")
_DEFAULT = OptimizeRequest()
_TOOLS = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


@checked_arguments
def optimize(source: Path, target: Path, request: OptimizeRequest = _DEFAULT) -> Manifest:
    """Optimize the engines of a directory into another one.

    Args:
        source: engines that export wrote.
        target: the engine directory to write; it appears complete or not at all.
        request: recipe, backend, gate and timing.

    Returns:
        The manifest that was written.

    Raises:
        ManifestError: the source is damaged, lacks a component, or was already optimized.
        SettingsError: no such recipe, target, gate or setting, or they do not fit together.
        GateError: the result is not good enough; it is kept as target.rejected.
        TargetError: the directory cannot be written.
    """
    check_target(target, overwrite=request.overwrite)
    if source.resolve() == target.resolve():
        raise TargetError(f"{target} is the directory to read: name another")
    job = plan(source, request)
    with staged_directory(target, overwrite=request.overwrite) as directory:
        return optimize_into(job, directory)


def optimize_into(job: OptimizeJob, directory: Path) -> Manifest:
    """Carry out a job in a staged directory: see optimize()."""
    start = time.perf_counter()
    check_space(directory, _bytes_needed(job))
    with Progress(_progress_parts(job), quiet=job.request.quiet) as progress:
        measured = job.request.budget is not None and job.sizing is None
        job = sized(job, progress)
        progress.resize(_progress_parts(job) + measured)
        with scratch_folder(directory, "recordings") as folder:
            origin = _record_source(job, folder, progress)
            candidates = [
                make(name, recipe, origin, _folder(directory, index), progress)
                for index, (name, recipe) in enumerate(job.recipes.items())
            ]
        results = _time(job, candidates, progress)
    chosen = _choose(candidates, results)
    _publish(chosen, candidates, directory)
    manifest = _manifest(job, chosen, candidates, results, start)
    manifest.write(directory)
    if chosen.failures:
        raise GateError(f"{chosen.name}: {'; '.join(chosen.failures)}")
    return manifest


def sized(job: OptimizeJob, progress: Progress) -> OptimizeJob:
    """Return the job in a size that keeps to its budget, if it has one and no size yet."""
    if job.request.budget is None:
        return job
    if job.sizing is None:
        job = fit(job, measure_cost(job, progress), job.request.budget)
        assert job.sizing is not None
        for line in job.sizing.lines():
            progress.note(line)
    if job.sizing is not None:
        progress.expect(job.sizing.seconds)
    return job


def _bytes_needed(job: OptimizeJob) -> int:
    """Return the bytes on disk: every candidate, and its portable variant if one is needed."""
    copies = len(job.recipes) * (1 if job.target.runs_on_cpu else 2)
    return int(_SPACE * job.manifest.size * copies)


def _progress_parts(job: OptimizeJob) -> int:
    """Return the number of parts of the work: fewer if candidates fail."""
    images = max(recipe.gate.images for recipe in job.recipes.values())
    recorded = sum(map(len, job.prompt_sets))
    rewritten = len(job.manifest.components) * (1 if job.target.runs_on_cpu else 2)
    layers = sum(recipe.measures_layers for recipe in job.recipes.values())
    return recorded + layers + (rewritten + 1 + images) * len(job.recipes) + job.is_timed


def _record_source(job: OptimizeJob, folder: Path, progress: Progress) -> Origin:
    """Run the source on the prompts of gate and calibration, and record its engines' calls."""
    gate, calibration = job.prompt_sets
    images = RecordingRequest(prompts=gate, settings=job.request.settings)
    inputs = RecordingRequest(
        prompts=calibration,
        settings=job.request.settings,
        calls=max(recipe.calibration.samples for recipe in job.recipes.values()),
        components=(DENOISER,),
    )
    run = partial(recorded, job.source, progress=progress)
    reference = run(images, folder / "gate", activity="reference")
    settings = reference.results[0].settings
    return Origin(
        directory=job.source,
        manifest=job.manifest,
        target=job.target,
        gate=reference,
        calibration=run(inputs, folder / "calibration", activity="calibration")
        if calibration
        else None,
        schedule=CalibrationSchedule(
            sampler=settings.sampler, steps=settings.steps, guidance_scale=settings.guidance_scale
        ),
    )


def _folder(directory: Path, index: int) -> Path:
    folder = directory / f"candidate-{index}"  # the name may be the path of a recipe's file
    folder.mkdir()
    return folder


def _time(
    job: OptimizeJob, candidates: Sequence[RecipeCandidate], progress: Progress
) -> Results | None:
    """Time the source and the candidates that passed; None if they cannot be timed here."""
    passing = [c for c in candidates if not c.failures]
    if not (job.is_timed and passing):
        return None
    with progress.part("interleaved timing"):
        with load(job.source, hashes=False, low_memory=True, example_images=True) as pipeline:
            settings = pipeline.settings(job.prompts[0], seed=0, **job.request.settings)
            settings = replace(settings, steps=job.timed_steps)
        try:
            return time_engines(
                [Participant.of(job.source, _INPUT)]
                + [Participant.of(c.folder, c.name) for c in passing],
                [manifest.size for manifest in (job.manifest, *(c.manifest for c in passing))],
                settings,
                repeats=job.request.pairs,
                outer=progress,
            )
        except FreeMemoryError:  # an optimized directory without timing is better than none
            return None


def _choose(candidates: Sequence[RecipeCandidate], results: Results | None) -> RecipeCandidate:
    """Return the fastest candidate that passed; the one with the highest PSNR if none did."""
    passing = {candidate.name: candidate for candidate in candidates if not candidate.failures}
    if not passing:
        return max(candidates, key=lambda c: c.measured.get("image", {}).get("psnr", -math.inf))
    if results is None:
        return next(iter(passing.values()))
    return passing[fastest([results[name] for name in passing])]


def _publish(
    chosen: RecipeCandidate, candidates: Sequence[RecipeCandidate], directory: Path
) -> None:
    """Move the chosen engines to the directory and delete the others."""
    for file in chosen.folder.iterdir():
        file.rename(directory / file.name)
    for candidate in candidates:
        shutil.rmtree(candidate.folder)


def _manifest(
    job: OptimizeJob,
    chosen: RecipeCandidate,
    candidates: Sequence[RecipeCandidate],
    results: Results | None,
    start: float,
) -> Manifest:
    """Return the manifest of the result, with a history entry of the stage."""
    measured = {part: dict(figures) for part, figures in chosen.measured.items()}
    if results is not None and not chosen.failures:
        measured["image"] |= _timings(results, chosen.name)
    stage = Stage.ended(
        STAGE,
        start,
        _options(job, chosen, candidates, results),
        packages=_TOOLS,
        passes=chosen.passes,
        measured=measured,
    )
    quality = {
        part: {key: value for key, value in figures.items() if key in _QUALITY}
        for part, figures in measured.items()
    }
    return msgspec.structs.replace(
        chosen.manifest,
        history=(*job.manifest.history, stage),
        quality=quality,
        components={
            name: msgspec.structs.replace(component, backend=job.target.source_backend)
            for name, component in chosen.manifest.components.items()
        },
    )


def _timings(results: Results, name: str) -> dict[str, float]:
    """Return seconds and bytes of memory before and after, and the paired speedup."""
    before, after = results[_INPUT], results[name]
    return rounded(
        {
            "seconds_before": before.median["total"],
            "seconds_after": after.median["total"],
            **speedup_figures(after.ratio["total"]),
            "denoiser_step_speedup": after.ratio["denoiser step"].value,
            "memory_before": float(before.peak_memory or 0),
            "memory_after": float(after.peak_memory or 0),
        }
    )


def _options(
    job: OptimizeJob,
    chosen: RecipeCandidate,
    candidates: Sequence[RecipeCandidate],
    results: Results | None,
) -> dict[str, Any]:
    """Return the request and the decisions, for the history."""
    options: dict[str, Any] = {
        "recipe": job.request.recipe,
        "target": job.request.target,
        "settings": msgspec.json.decode(msgspec.json.encode(chosen.recipe)),
        **job.request.settings,
    }
    if job.sizing is not None:
        options["sizing"] = job.sizing.record()
    if chosen.layers:
        kept = set(chosen.kept)
        options["layers"] = [{**asdict(x), "kept_float": x.name in kept} for x in chosen.layers]
    if len(candidates) > 1:
        options["chosen"] = chosen.name
        options["candidates"] = {c.name: _summary(c, results) for c in candidates}
    return options


def _summary(candidate: RecipeCandidate, results: Results | None) -> dict[str, Any]:
    """Return the figures of one of several candidates."""
    figures = dict(candidate.measured.get("image", {}))
    if candidate.failures:
        return {**figures, "failures": list(candidate.failures)}
    return {**figures, **(_timings(results, candidate.name) if results else {})}
