"""The optimize stage: an engine directory in, an optimized one out, behind a quality gate."""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from latentforge.measure.bench.interleaved import measure, require_all_ok
from latentforge.measure.bench.protocol import Participant
from latentforge.measure.results import BenchResult
from latentforge.optimize.stage.candidate import Origin, RecipeCandidate, make
from latentforge.optimize.stage.job import STAGE, OptimizeJob, plan
from latentforge.optimize.stage.recording import record
from latentforge.runtime.errors import GateError, TargetError
from latentforge.runtime.files import check_space, check_target, staged_directory
from latentforge.runtime.history import package_versions, stage_record
from latentforge.runtime.loader import load
from latentforge.runtime.machine import available_cores, fit_together
from latentforge.runtime.manifest import CalibrationSchedule, Manifest
from latentforge.runtime.progress import Progress

__all__ = ["optimize", "optimize_into"]

Timed = Mapping[str, BenchResult]
"""What the source and the candidates took, by name."""

_INPUT = "input"  # the name of the source among what is timed
_MARGIN = 1.03  # a later candidate has to be this much faster: less is noise
_SPACE = 1.1
_QUALITY = ("max_relative_error", "psnr", "psnr_worst", "ssim", "perceptual", "latents_psnr")
_TOOLS = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def optimize(
    source: Path,
    target: Path,
    *,
    recipe: str = "fp32",
    backend: str = "cpu",
    gate: Sequence[str] = (),
    prompts: Path | None = None,
    calibrate: int | None = None,
    request: Mapping[str, Any] | None = None,
    repeats: int = 3,
    overwrite: bool = False,
    quiet: bool = True,
) -> Manifest:
    """Optimize the engines of a directory into another one.

    Args:
        source: what export wrote.
        target: the engine directory to write, whole or not at all.
        recipe: the name of one that comes with the package, or a TOML file.
        backend: what will run the result: a name of TARGETS.
        gate: thresholds in place of the recipe's, each as NAME=VALUE.
        prompts: a text file, one a line; those that come with the package if None.
        calibrate: how many prompts to calibrate with, in place of the recipe's.
        request: settings of the schedule that will be deployed, such as steps and sampler; those
            of the manifest where not given.
        repeats: pairs of images that are timed against the source; 0 times nothing.
        overwrite: replace an engine directory that is there already.
        quiet: show no progress.

    Raises:
        ManifestError: the source is damaged, lacks a component, or was optimized already.
        SettingsError: no such recipe, target, gate or setting, or they do not fit together.
        GateError: the result is not good enough; it is kept as target.rejected.
        TargetError: the directory cannot be written.
    """
    check_target(target, overwrite=overwrite)
    if source.resolve() == target.resolve():
        raise TargetError(f"{target} is the directory to read: name another")
    job = plan(
        source,
        recipe=recipe,
        backend=backend,
        gate=gate,
        prompts=prompts,
        calibrate=calibrate,
        request=request,
        repeats=repeats,
    )
    with staged_directory(target, overwrite=overwrite) as directory:
        return optimize_into(job, directory, quiet=quiet)


def optimize_into(job: OptimizeJob, directory: Path, *, quiet: bool = True) -> Manifest:
    """Do what plan() planned, in a directory that is staged: see optimize()."""
    start = time.perf_counter()
    check_space(directory, _needed(job))
    with Progress(_parts(job), quiet=quiet) as progress:
        origin = _origin(job, progress)
        candidates = [
            make(name, recipe, origin, _folder(directory, name), progress)
            for name, recipe in job.recipes.items()
        ]
        timed = _timed(job, candidates, progress)
    chosen = _chosen(candidates, timed)
    _settle(chosen, candidates, directory)
    manifest = _described(job, chosen, candidates, timed, start)
    manifest.write(directory)
    if chosen.failures:
        raise GateError(f"{chosen.name}: {'; '.join(chosen.failures)}")
    return manifest


def _needed(job: OptimizeJob) -> int:
    """Bytes on the disk: results are hardly larger than the input, and some have a twin."""
    copies = len(job.recipes) * (1 if job.target.runs_on_cpu else 2)
    return int(_SPACE * job.manifest.size * copies)


def _parts(job: OptimizeJob) -> int:
    """How many there are to show progress of."""
    images = max(recipe.gate.images for recipe in job.recipes.values())
    recorded = sum(map(len, job.shares))
    each = 2 * len(job.manifest.components) + images + 2
    return recorded + each * len(job.recipes)


def _origin(job: OptimizeJob, progress: Progress) -> Origin:
    """Run the source on the prompts, and keep what its engines saw."""
    gate, others = job.shares
    run = partial(record, job.source, request=job.request, progress=progress)
    judged = run(gate, what="reference")
    calibration = run(others, what="calibration") if others else None
    made = judged.results[0].settings
    return Origin(
        directory=job.source,
        manifest=job.manifest,
        target=job.target,
        gate=judged,
        calibration=calibration,
        schedule=CalibrationSchedule(
            sampler=made.sampler, steps=made.steps, guidance_scale=made.guidance_scale
        ),
    )


def _folder(directory: Path, name: str) -> Path:
    folder = directory / f"candidate-{name}"
    folder.mkdir()
    return folder


def _timed(
    job: OptimizeJob, candidates: Sequence[RecipeCandidate], progress: Progress
) -> Timed | None:
    """Let the source and the candidates that are good enough, and run here, take turns."""
    able = [c for c in candidates if not c.failures]
    sizes = [manifest.size for manifest in (job.manifest, *(c.manifest for c in able))]
    together = fit_together(sizes)
    if not (job.repeats and able and job.target.runs_on_cpu) or together is None:
        return None
    with load(job.source, hashes=False, low_memory=True) as pipeline:
        settings = pipeline.settings(job.prompts[0], seed=0, **job.request)
    with progress.part("timing, in turns"):
        measured = measure(
            [Participant.of(job.source, _INPUT), *(Participant.of(c.folder, c.name) for c in able)],
            settings,
            threads=available_cores(),
            repeats=job.repeats,
            together=together,
        )
    return {entry.name: entry for entry in require_all_ok(measured).entries}


def _chosen(candidates: Sequence[RecipeCandidate], timed: Timed | None) -> RecipeCandidate:
    """The fastest that is good enough; the one that comes nearest if none is.

    One that stands later in the recipe has to be faster by more than noise.
    """
    able = [candidate for candidate in candidates if not candidate.failures]
    if not able:
        return max(candidates, key=lambda c: c.measured.get("image", {}).get("psnr", -math.inf))
    best = able[0]
    if timed is None:  # the machine may have too little memory to tell
        return best
    for candidate in able[1:]:
        if _speedup(timed, candidate) > _MARGIN * _speedup(timed, best):
            best = candidate
    return best


def _speedup(timed: Timed, candidate: RecipeCandidate) -> float:
    return timed[candidate.name].ratio["total"].value


def _settle(
    chosen: RecipeCandidate, candidates: Sequence[RecipeCandidate], directory: Path
) -> None:
    """Move the chosen engines to where they belong, and delete the others."""
    for file in chosen.folder.iterdir():
        file.rename(directory / file.name)
    for candidate in candidates:
        shutil.rmtree(candidate.folder)


def _described(
    job: OptimizeJob,
    chosen: RecipeCandidate,
    candidates: Sequence[RecipeCandidate],
    timed: Timed | None,
    start: float,
) -> Manifest:
    """The manifest of the result, with what was done and measured."""
    measured = {part: dict(figures) for part, figures in chosen.measured.items()}
    if timed is not None and not chosen.failures:
        measured["image"] |= _timings(timed, chosen.name)
    stage = stage_record(
        STAGE,
        start,
        _options(job, chosen, candidates, timed),
        tools=package_versions(*_TOOLS),
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


def _timings(timed: Timed, name: str) -> dict[str, float]:
    """Seconds and bytes of memory before and after, and the paired ratio with its range."""
    before, after = timed[_INPUT], timed[name]
    pairs = zip(before.runs, after.runs, strict=True)
    speedups = [a.seconds["total"] / b.seconds["total"] for a, b in pairs]
    figures = {
        "seconds_before": before.median["total"],
        "seconds_after": after.median["total"],
        "speedup": after.ratio["total"].value,
        "speedup_min": min(speedups),
        "speedup_max": max(speedups),
        "denoiser_step_speedup": after.ratio["denoiser step"].value,
        "memory_before": float(before.peak_memory or 0),
        "memory_after": float(after.peak_memory or 0),
    }
    return {key: float(f"{value:.4g}") for key, value in figures.items()}


def _options(
    job: OptimizeJob,
    chosen: RecipeCandidate,
    candidates: Sequence[RecipeCandidate],
    timed: Timed | None,
) -> dict[str, Any]:
    """What was asked for, and what was decided."""
    options: dict[str, Any] = {
        "recipe": job.recipe,
        "target": job.backend,
        "settings": msgspec.json.decode(msgspec.json.encode(chosen.recipe)),
        **job.request,
    }
    if chosen.layers:
        kept = set(chosen.kept)
        options["layers"] = [{**asdict(x), "kept_float": x.name in kept} for x in chosen.layers]
    if len(candidates) > 1:
        options["chosen"] = chosen.name
        options["candidates"] = {c.name: _summary(c, timed) for c in candidates}
    return options


def _summary(candidate: RecipeCandidate, timed: Timed | None) -> dict[str, Any]:
    """How a candidate of several did."""
    figures = dict(candidate.measured.get("image", {}))
    if candidate.failures:
        return {**figures, "failures": list(candidate.failures)}
    return {**figures, **(_timings(timed, candidate.name) if timed else {})}
