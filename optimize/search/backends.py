"""Choices made by measuring on this machine: a backend per component, and rows per denoiser run."""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import msgspec

from latentforge.measure.bench.protocol import Participant
from latentforge.measure.results import BenchResult
from latentforge.optimize.timing import MARGIN, fastest, time_engines
from latentforge.runtime import sampling
from latentforge.runtime.compile.verify import trial_settings
from latentforge.runtime.files import copy_files
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import DENOISER_PARTS, Component, Manifest, Stage
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import Settings

__all__ = ["STAGE", "select_backends", "tune_rows"]

STAGE = "select"
"""Name of the stage in the history of a manifest."""

_STEPS = 4
_TUNED_BACKENDS = ("onnxruntime", "openvino")
_VAE = ("vae_encoder", "vae_decoder")


def select_backends(
    candidates: Mapping[str, Path],
    directory: Path,
    *,
    refused: Mapping[str, str] | None = None,
    repeats: int = 3,
    quiet: bool = True,
) -> Manifest:
    """Time candidates with interleaved runs, and assemble engines of the fastest components.

    The parts of the denoiser pass tensors to each other and are selected together. The VAE encoder,
    which text to image does not run, comes from the same candidate as the decoder. An earlier
    candidate is preferred unless a later one is faster by more than 3 %.

    Args:
        candidates: engine directories of one model, by target; their files are moved.
        directory: staged, without any of these files.
        refused: targets that are no candidates, and the reason, for the history.
        repeats: counted images of each candidate.
        quiet: show no progress.

    Returns:
        The manifest that was written.

    Raises:
        BackendError: a candidate does not run on this machine, or too little memory is free.
    """
    start = time.perf_counter()
    manifests = {name: Manifest.read(path, hashes=False) for name, path in candidates.items()}
    results = time_engines(
        [Participant.of(path, name) for name, path in candidates.items()],
        [manifest.size for manifest in manifests.values()],
        _settings(next(iter(candidates.values()))),
        repeats=repeats,
        quiet=quiet,
    )
    first = next(iter(manifests.values()))
    chosen: dict[str, str] = {}
    for group, stage in _groups(first).items():
        best = fastest(list(results.values()), stage)
        chosen |= {name: best for name in manifests[best].components if name in group}
    components = {
        name: _move(manifests[source].components[name], candidates[source], directory)
        for name, source in chosen.items()
    }
    tokenizers = (entry.file for entry in first.tokenizers.values())
    copy_files(tokenizers, next(iter(candidates.values())), directory)
    record = _record(chosen, components, results, refused or {}, start)
    manifest = msgspec.structs.replace(
        first, components=components, history=(*first.history, record)
    )
    manifest.write(directory)
    return manifest


def tune_rows(directory: Path, *, repeats: int = 3, quiet: bool = True) -> Manifest:
    """Set ``max_rows`` of the denoiser to 1 if guidance is faster in runs of one row.

    Engines built for a fixed number of rows, engines of other backends, and models without guidance
    by default are not changed.

    Args:
        directory: complete engines, such as staged ones.
        repeats: counted pairs of steps at the default size.
        quiet: show no progress.

    Returns:
        The manifest, which was written if it changed.
    """
    manifest = Manifest.read(directory, hashes=False)
    denoiser = manifest.components["denoiser"]
    free = isinstance(denoiser.inputs["sample"].shape[0], str) and not denoiser.shapes
    tunable = free and denoiser.backend in _TUNED_BACKENDS and manifest.defaults.guidance_scale > 1
    if not tunable:
        return manifest
    with Progress(1, quiet=quiet) as progress, progress.part("rows per denoiser run"):
        speedup = _single_row_speedup(directory, repeats, progress)
    if speedup < MARGIN:
        return manifest
    denoiser = msgspec.structs.replace(denoiser, max_rows=1)
    manifest = msgspec.structs.replace(
        manifest, components={**manifest.components, "denoiser": denoiser}
    )
    manifest.write(directory)
    return manifest


def _single_row_speedup(directory: Path, repeats: int, progress: Progress) -> float:
    """Return the speedup of single rows over all rows per run; the first pair is a warm-up."""
    with load(directory, hashes=False, example_images=True) as pipeline:
        count = pipeline.settings("a cat").guidance_rows
        seconds: dict[int, list[float]] = {count: [], 1: []}
        for pair in range(repeats + 1):
            progress.within("pair", pair, repeats + 1)
            for rows, times in seconds.items():
                times.append(_step_seconds(pipeline, rows))
    pairs = zip(seconds[count][1:], seconds[1][1:], strict=True)
    return median(whole / split for whole, split in pairs)


def _step_seconds(pipeline: Pipeline, rows: int) -> float:
    """Return the seconds of a run of one step, with so many rows per denoiser run."""
    sampler = sampling.plain(pipeline.manifest.schedule)
    start = time.perf_counter()
    for _step in pipeline.stream(
        "a cat", max_rows=rows, sampler=sampler, steps=1, seed=0, unaccelerated=True
    ):
        pass
    return time.perf_counter() - start


def _settings(engines: Path) -> Settings:
    """Return a short request at the default size, or at the size the engines were built for."""
    with load(engines, hashes=False, low_memory=True, example_images=True) as pipeline:
        latent, defaults = pipeline.manifest.latent, pipeline.manifest.defaults
        fixed = latent.image_sizes(pipeline.engines["denoiser"].component)
        size = {} if fixed else {"height": defaults.height, "width": defaults.width}
        return trial_settings(pipeline, steps=_STEPS, **size)


def _groups(manifest: Manifest) -> dict[tuple[str, ...], str]:
    """Return the timed stage of a run for each group of components that are selected together."""
    encoders = tuple(encoder.component for encoder in manifest.conditioning.encoders)
    return {encoders: "text_encoder", DENOISER_PARTS: "denoiser step", _VAE: "vae_decoder"}


def _move(component: Component, source: Path, directory: Path) -> Component:
    for entry in component.files:
        (directory / entry.file).parent.mkdir(parents=True, exist_ok=True)
        (source / entry.file).rename(directory / entry.file)
    return component


def _record(
    chosen: Mapping[str, str],
    components: Mapping[str, Component],
    results: Mapping[str, BenchResult],
    refused: Mapping[str, str],
    start: float,
) -> Stage:
    """Return the history entry, with the paired speedups over the first candidate by stage."""
    reference, *others = results
    ratios = {
        name: {stage: round(ratio.value, 3) for stage, ratio in results[name].ratio.items()}
        for name in others
    }
    return Stage.ended(
        STAGE,
        start,
        {
            "target": "auto",
            "backends": {name: component.backend for name, component in components.items()},
            "options": {},
            "chosen": dict(chosen),
            "reference": reference,
            "ratios": ratios,
            "refused": dict(refused),
        },
    )
