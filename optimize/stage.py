"""The optimize stage: an engine directory in, an optimized one out, behind a quality gate."""

import importlib.metadata
import itertools
import math
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

import latentforge
from latentforge.optimize.candidate import Candidate, Origin, make
from latentforge.optimize.component import UNET, load_graph
from latentforge.optimize.passes import PASSES
from latentforge.optimize.quantize import check_float
from latentforge.optimize.recipe import Recipe, near_miss, read_recipe
from latentforge.optimize.recording import read_prompts, record
from latentforge.optimize.targets import TARGETS
from latentforge.runtime.bench import (
    Comparison,
    Contender,
    Measurement,
    available_cores,
    available_memory,
    compare,
)
from latentforge.runtime.errors import GateError, ManifestError, SettingsError, TargetError
from latentforge.runtime.manifest import Calibration, Manifest, Stage
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.staging import check_space, check_target, staged_directory
from latentforge.runtime.worker import settings_to_json

__all__ = ["Job", "STAGE", "optimize", "optimize_into", "plan"]

STAGE = "optimize"
"""Its name in a manifest's history."""

_MARGIN = 1.03  # a later candidate has to be this much faster: less is noise
_MOST_REPEATS = 1000
_SPACE = 1.1
_MEMORY = 3  # times its files, which is what a process takes that paints with them
_QUALITY = ("max_relative_error", "psnr", "psnr_worst", "ssim", "perceptual", "latents_psnr")
_TOOLS = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one optimization works on.

    Attributes:
        source: the engine directory to read.
        manifest: what it says.
        recipe: as it was asked for.
        recipes: what it comes to; of several, the fastest that passes its gate is taken.
        backend: what the result is for, a name of TARGETS.
        prompts: those of the gate first, then those of the calibration.
        request: the schedule and size that will be deployed, as far as the manifest's is not.
        repeats: timed pairs of images; 0 times nothing.
    """

    source: Path
    manifest: Manifest
    recipe: str
    recipes: Mapping[str, Recipe]
    backend: str
    prompts: tuple[str, ...]
    request: Mapping[str, Any]
    repeats: int


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


def plan(
    source: Path,
    *,
    recipe: str,
    backend: str,
    gate: Sequence[str] = (),
    prompts: Path | None = None,
    calibrate: int | None = None,
    request: Mapping[str, Any] | None = None,
    repeats: int = 3,
) -> Job:
    """Check everything that can be before work begins; see optimize() for arguments and errors."""
    if backend not in TARGETS:
        raise SettingsError(f"no target {backend!r}; {near_miss(backend, list(TARGETS))}")
    if not 0 <= repeats <= _MOST_REPEATS:
        raise SettingsError(f"repeats is a number from 0 to {_MOST_REPEATS}, not {repeats}")
    manifest = Manifest.read(source)
    _check_source(source, manifest)
    recipes = _recipes(recipe, gate, calibrate)
    for name, each in recipes.items():
        _check_recipe(name, each, backend, manifest)
    _check_graphs(source, manifest, recipes.values())
    if len(recipes) > 1 and not (repeats and TARGETS[backend].runs_here):
        raise SettingsError(
            f"recipe {recipe} chooses by measuring, which needs --repeats from 1 up and a target "
            "that runs here: name one recipe"
        )
    return Job(
        source=source,
        manifest=manifest,
        recipe=recipe,
        recipes=recipes,
        backend=backend,
        prompts=tuple(read_prompts(prompts)),
        request={k: v for k, v in (request or {}).items() if v is not None},
        repeats=repeats,
    )


def _check_source(source: Path, manifest: Manifest) -> None:
    if done := [stage for stage in manifest.history if stage.name == STAGE]:
        was = done[-1].options.get("recipe")
        raise ManifestError(
            f"{source} was optimized already, with recipe {was}: start from the exported engines, "
            "and say all that is wanted in one recipe"
        )
    if missing := [name for name in manifest.needed if name not in manifest.components]:
        raise ManifestError(
            f"{source} has no {missing[0]}, without which no picture can be compared: export it "
            "without --components"
        )


def _recipes(name: str, gate: Sequence[str], calibrate: int | None) -> dict[str, Recipe]:
    """The recipe, or those that it measures, with what the command line changes."""
    recipe = read_recipe(name)
    chosen = {n: read_recipe(n) for n in recipe.candidates} or {name: recipe}
    changed = {}
    for key, each in chosen.items():
        calibration = each.calibration
        if calibrate is not None:
            calibration = msgspec.structs.replace(calibration, prompts=calibrate)
        scan = each.scan or (recipe.scan if each.precision_of(UNET) == "int8" else None)
        changed[Path(key).stem] = msgspec.structs.replace(
            each, gate=each.gate.changed(gate), calibration=calibration, scan=scan
        )
    return changed


def _check_recipe(name: str, recipe: Recipe, backend: str, manifest: Manifest) -> None:
    """Refuse what asks for something that is not there, or that its target cannot do."""
    if recipe.candidates:
        raise SettingsError(f"recipe {name} measures others, and cannot be one of them")
    if unknown := [p for p in recipe.skip if p not in PASSES]:
        raise SettingsError(f"recipe {name}: no pass {_mistaken(unknown, PASSES)}")
    known = ("default", "vae_encoder", *manifest.components)
    if unknown := [c for c in recipe.precision if c not in known]:
        raise SettingsError(f"recipe {name}: no component {_mistaken(unknown, known)}")
    wrong = [c for c, precision in recipe.precision.items() if precision == "int8" and c != UNET]
    if wrong:
        raise SettingsError(
            f"recipe {name}: {wrong[0]} cannot be int8, only the unet is calibrated: "
            "int8-weights makes its file as small"
        )
    if backend == "cuda" and recipe.precision_of(UNET) == "int8":
        raise SettingsError(
            "ONNX Runtime's CUDA provider has no 8-bit convolutions and would run them on the CPU: "
            "take --target tensorrt for int8, or the recipe fp16"
        )


def _check_graphs(source: Path, manifest: Manifest, recipes: Iterable[Recipe]) -> None:
    """Refuse foreign graphs, and those that are quantized already, before any picture is made."""
    for name, component in manifest.components.items():
        model = load_graph(name, component, source)
        if any(recipe.quantizes(name) for recipe in recipes):
            check_float(model)


def _mistaken(words: Sequence[str], known: Iterable[str]) -> str:
    return f"{words[0]!r}; {near_miss(words[0], list(known))}"


def optimize_into(job: Job, directory: Path, *, quiet: bool = True) -> Manifest:
    """Do what plan() planned, in a directory that is staged: see optimize()."""
    start = time.perf_counter()
    check_space(directory, _needed(job))
    with Progress(_parts(job), quiet=quiet) as progress:
        origin = _origin(job, progress)
        candidates = [
            make(name, recipe, origin, _folder(directory, name), progress)
            for name, recipe in job.recipes.items()
        ]
        comparison = _timed(job, candidates, progress)
    chosen = _chosen(candidates, comparison)
    _settle(chosen, candidates, directory)
    manifest = _described(job, chosen, candidates, comparison, start)
    manifest.write(directory)
    if chosen.failures:
        raise GateError(f"{chosen.name}: {'; '.join(chosen.failures)}")
    return manifest


def _needed(job: Job) -> int:
    """Bytes on the disk: results are hardly larger than the input, and some have a twin."""
    copies = len(job.recipes) * (1 if TARGETS[job.backend].runs_here else 2)
    return int(_SPACE * _size(job.manifest) * copies)


def _parts(job: Job) -> int:
    """How many there are to show progress of."""
    images = max(recipe.gate.images for recipe in job.recipes.values())
    recorded = sum(map(len, _shares(job)))
    each = 2 * len(job.manifest.components) + images + 2
    return recorded + each * len(job.recipes)


def _shares(job: Job) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The gate's prompts, and those for calibration: others, unless there are too few."""
    recipes = job.recipes.values()
    images = max(recipe.gate.images for recipe in recipes)
    wanted = max((r.calibration.prompts for r in recipes if r.calibrated), default=0)
    gate = tuple(itertools.islice(itertools.cycle(job.prompts), images))
    rest = job.prompts[images:] or job.prompts
    return gate, rest[:wanted]


def _origin(job: Job, progress: Progress) -> Origin:
    """Run the source on the prompts, and keep what its engines saw."""
    gate, others = _shares(job)
    run = partial(record, job.source, request=job.request, progress=progress)
    judged = run(gate, what="reference")
    calibration = run(others, what="calibration") if others else None
    made = judged.results[0].settings
    return Origin(
        directory=job.source,
        manifest=job.manifest,
        target=TARGETS[job.backend],
        gate=judged,
        calibration=calibration,
        schedule=Calibration(
            sampler=made.sampler, steps=made.steps, guidance_scale=made.guidance_scale
        ),
    )


def _folder(directory: Path, name: str) -> Path:
    folder = directory / f"candidate-{name}"
    folder.mkdir()
    return folder


def _timed(job: Job, candidates: Sequence[Candidate], progress: Progress) -> Comparison | None:
    """Let the source and the candidates that are good enough, and run here, take turns."""
    able = [c for c in candidates if not c.failures]
    sizes = [_size(manifest) for manifest in (job.manifest, *(c.manifest for c in able))]
    free = (available_memory() or math.inf) / _MEMORY
    if not (job.repeats and able and TARGETS[job.backend].runs_here and max(sizes) < free):
        return None
    python = (sys.executable, "-m", "latentforge.runtime.worker")
    with Pipeline.load(job.source, hashes=False, low_memory=True) as pipeline:
        settings = pipeline.settings(job.prompts[0], seed=0, **job.request)
    with progress.part("timing, in turns"):
        return compare(
            [Contender("input", (*python, str(job.source)))]
            + [Contender(c.name, (*python, str(c.folder))) for c in able],
            settings_to_json(settings),
            threads=available_cores(),
            repeats=job.repeats,
            together=sum(sizes) < free,
        )


def _size(manifest: Manifest) -> int:
    return sum(component.size for component in manifest.components.values())


def _chosen(candidates: Sequence[Candidate], comparison: Comparison | None) -> Candidate:
    """The fastest that is good enough; the one that comes nearest if none is.

    One that stands later in the recipe has to be faster by more than noise.
    """
    able = [candidate for candidate in candidates if not candidate.failures]
    if not able:
        return max(candidates, key=lambda c: c.measured.get("image", {}).get("psnr", -math.inf))
    best = able[0]
    if comparison is None:  # the machine may have too little memory to tell
        return best
    for candidate in able[1:]:
        if _speedup(comparison, candidate) > _MARGIN * _speedup(comparison, best):
            best = candidate
    return best


def _speedup(comparison: Comparison, candidate: Candidate) -> float:
    return comparison.ratio(_measurement(comparison, candidate.name), "total")


def _measurement(comparison: Comparison, name: str) -> Measurement:
    return next(m for m in comparison.measurements if m.name == name)


def _settle(chosen: Candidate, candidates: Sequence[Candidate], directory: Path) -> None:
    """Move the chosen engines to where they belong, and delete the others."""
    for file in chosen.folder.iterdir():
        file.rename(directory / file.name)
    for candidate in candidates:
        shutil.rmtree(candidate.folder)


def _described(
    job: Job,
    chosen: Candidate,
    candidates: Sequence[Candidate],
    comparison: Comparison | None,
    start: float,
) -> Manifest:
    """The manifest of the result, with what was done and measured."""
    measured = {part: dict(figures) for part, figures in chosen.measured.items()}
    if comparison is not None and not chosen.failures:
        measured["image"] |= _timings(comparison, chosen.name)
    stage = Stage(
        name=STAGE,
        options=_options(job, chosen, candidates, comparison),
        tools={
            "latentforge": latentforge.__version__,
            **{name: importlib.metadata.version(name) for name in _TOOLS},
        },
        seconds=round(time.perf_counter() - start, 1),
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
        device={} if TARGETS[job.backend].runs_here else {"target": job.backend},
    )


def _timings(comparison: Comparison, name: str) -> dict[str, float]:
    """Seconds and bytes of memory before and after, and the paired ratio with its range."""
    before, after = comparison.reference, _measurement(comparison, name)
    least, most = comparison.spread(after)
    figures = {
        "seconds_before": before.medians["total"],
        "seconds_after": after.medians["total"],
        "speedup": comparison.ratio(after, "total"),
        "speedup_least": least,
        "speedup_most": most,
        "unet_step_speedup": comparison.ratio(after, "unet step"),
        "memory_before": float(before.peak_memory),
        "memory_after": float(after.peak_memory),
    }
    return {key: float(f"{value:.4g}") for key, value in figures.items()}


def _options(
    job: Job,
    chosen: Candidate,
    candidates: Sequence[Candidate],
    comparison: Comparison | None,
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
        options["layers"] = [{**asdict(x), "kept": x.name in kept} for x in chosen.layers]
    if len(candidates) > 1:
        options["chosen"] = chosen.name
        options["candidates"] = {c.name: _summary(c, comparison) for c in candidates}
    return options


def _summary(candidate: Candidate, comparison: Comparison | None) -> dict[str, Any]:
    """How a candidate of several did."""
    figures = dict(candidate.measured.get("image", {}))
    if candidate.failures:
        return {**figures, "failures": list(candidate.failures)}
    return {**figures, **(_timings(comparison, candidate.name) if comparison else {})}
