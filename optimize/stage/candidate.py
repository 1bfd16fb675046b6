"""Candidate of an optimization: the engines of one recipe, and their distance to the source."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentforge.optimize.gate.comparison import component_errors, image_errors
from latentforge.optimize.gate.gate import Measured
from latentforge.optimize.graph_io import DENOISER, free_graphs, load_graph, weight_files
from latentforge.optimize.quantize.sensitivity import (
    Denoise,
    LayerSensitivity,
    measure_sensitivity,
    select_sensitive,
)
from latentforge.optimize.recipe import Recipe
from latentforge.optimize.recording import CallRecording, RecordedImage, sample_evenly
from latentforge.optimize.stage.component import Rewriter, Rewritten, save_part
from latentforge.optimize.targets import Target
from latentforge.runtime import sampling
from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.errors import BackendError, GateError
from latentforge.runtime.files import copy_files
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import CalibrationSchedule, Component, Manifest
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.progress import Progress
from latentforge.runtime.tensor import Feeds

__all__ = ["RecipeCandidate", "Origin", "make"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Source engines that candidates are made of and compared with.

    Attributes:
        directory: of the source.
        manifest: of the source.
        target: that the result is for.
        gate: recorded runs whose images the gate compares.
        calibration: recorded runs of other prompts, for value ranges and pruning scores; None if
            no recipe needs them.
        schedule: of these runs.
    """

    directory: Path
    manifest: Manifest
    target: Target
    gate: CallRecording
    calibration: CallRecording | None
    schedule: CalibrationSchedule


@dataclass(frozen=True, kw_only=True)
class RecipeCandidate:
    """Result of one recipe.

    Attributes:
        name: of the recipe.
        recipe: with the layers that the sensitivity measurement keeps in float.
        folder: of the engines.
        manifest: of the engines, without the history entry of this stage.
        passes: number of rewrites, by COMPONENT/PASS.
        measured: figures by component, or ``image``.
        layers: sensitivity of each layer, worst first, if the recipe measures it.
        kept: names of layers that stayed in float because of that.
        failures: thresholds of the gate that were missed.
    """

    name: str
    recipe: Recipe
    folder: Path
    manifest: Manifest
    passes: Mapping[str, int]
    measured: Measured
    layers: tuple[LayerSensitivity, ...]
    kept: tuple[str, ...]
    failures: tuple[str, ...]


def make(
    name: str, recipe: Recipe, origin: Origin, folder: Path, progress: Progress
) -> RecipeCandidate:
    """Carry out a recipe in an empty folder, and measure the result.

    If this machine cannot run the target's operators, a portable variant without them is measured
    in its place, and deleted.
    """
    layers, kept = _measure_layers(recipe, origin, progress)
    if kept:
        settings = msgspec.structs.replace(recipe.int8, exclude=(*recipe.int8.exclude, *kept))
        recipe = msgspec.structs.replace(recipe, int8=settings)
    rewriter = Rewriter(recipe=recipe, target=origin.target, feeds=_feeds(recipe, origin))
    manifest, rewritten = _write(rewriter, origin, folder, progress)
    judged = folder
    if not origin.target.runs_on_cpu:
        judged = folder / "portable"
        judged.mkdir()
        _write(replace(rewriter, portable=True), origin, judged, progress)
    errors, failures = _judge(recipe, origin, judged, progress)
    if judged != folder:
        shutil.rmtree(judged)
    sizes = _sizes(rewritten, manifest, origin.manifest)
    parts = {**sizes, **errors}
    measured = {part: {**sizes.get(part, {}), **errors.get(part, {})} for part in parts}
    return RecipeCandidate(
        name=name,
        recipe=recipe,
        folder=folder,
        manifest=manifest,
        passes=_passes(rewritten),
        measured=measured,
        layers=layers,
        kept=kept,
        failures=failures,
    )


def _measure_layers(
    recipe: Recipe, origin: Origin, progress: Progress
) -> tuple[tuple[LayerSensitivity, ...], tuple[str, ...]]:
    """Measure the sensitivity of each int8 layer, if the recipe asks for it, and pick the worst."""
    if recipe.sensitivity is None or recipe.precision_of(DENOISER) != "int8":
        return (), ()
    assert origin.calibration is not None
    with progress.part(f"{DENOISER}: sensitivity of layers"):
        model = load_graph(DENOISER, origin.manifest.components[DENOISER], origin.directory)
        rewriter = Rewriter(recipe=recipe, target=origin.target, feeds={})
        rewriter.fuse(model, "int8", half=False)
        feeds, form = _feeds(recipe, origin)[DENOISER], origin.target.form
        settings = origin.target.int8_settings(recipe.int8)
        slot = _SessionSlot()
        with load(
            origin.directory, hashes=False, wrap_session=slot.wrap, example_images=True
        ) as pipeline:
            latents = _latents(
                pipeline, slot, origin.calibration.results[0], recipe.sensitivity.steps
            )
            layers = measure_sensitivity(
                model, feeds, settings, latents, form=form, report=progress.within
            )
    return tuple(layers), select_sensitive(layers, recipe.sensitivity)


class _SessionSlot:
    """Session of the denoiser that can be exchanged between runs of a pipeline."""

    session: Session

    def wrap(self, name: str, session: Session) -> Session:
        """Replace the denoiser's session by this one: see load()."""
        if name != DENOISER:
            return session
        self.session = session
        return self

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        return self.session.run(feeds)

    def layers(self) -> list[LayerTime]:
        return self.session.layers()

    def close(self) -> None:
        self.session.close()


def _latents(
    pipeline: Pipeline, slot: _SessionSlot, reference: RecordedImage, steps: int
) -> Denoise:
    """Return a function from a denoiser session to the final latents of a short run."""
    sampler = sampling.plain(pipeline.manifest.schedule)
    settings = replace(reference.settings, sampler=sampler, steps=steps)

    def latents(session: Session) -> NDArray[np.float32]:
        slot.session = session
        return pipeline.run(settings).latents

    return latents


def _feeds(recipe: Recipe, origin: Origin) -> dict[str, list[Any]]:
    """Return the recorded inputs for calibration by component, evenly spaced over all steps."""
    if origin.calibration is None:
        return {}
    return {
        name: [call.feeds for call in sample_evenly(calls, recipe.calibration.samples)]
        for name, calls in origin.calibration.calls.items()
    }


def _write(
    rewriter: Rewriter, origin: Origin, folder: Path, progress: Progress
) -> tuple[Manifest, dict[str, Rewritten]]:
    """Rewrite every component into a folder, with a manifest that can be loaded."""
    components: dict[str, Component] = {}
    rewritten: dict[str, Rewritten] = {}
    for name in origin.manifest.components:
        with progress.part(f"{name}: rewrite"):
            saved, rewritten[name] = _rewrite(rewriter, name, origin, folder)
        components |= saved
    tokenizers = (entry.file for entry in origin.manifest.tokenizers.values())
    copy_files(tokenizers, origin.directory, folder)
    # an acceleration plan was gated with other engines
    manifest = msgspec.structs.replace(
        origin.manifest, components=components, quality={}, acceleration=None
    )
    manifest.write(folder)
    return manifest, rewritten


def _rewrite(
    rewriter: Rewriter, name: str, origin: Origin, folder: Path
) -> tuple[dict[str, Component], Rewritten]:
    """Rewrite a component into a folder, and return the entries of its parts; no graph is kept."""
    component = origin.manifest.components[name]
    model = load_graph(name, component, origin.directory)
    weights = weight_files(model)
    made = rewriter.rewrite(name, model, component)
    calibration = origin.schedule if made.precision == "int8" else None
    component = msgspec.structs.replace(
        component, precision=made.precision, calibration=calibration
    )
    saved = {
        part: save_part(part, graph, component, folder)
        for part, graph in made.parts.items()
        if graph is not None
    }
    del model
    made = replace(made, parts=dict.fromkeys(made.parts))
    if weights:
        free_graphs(weights)
    return saved, made


def _judge(
    recipe: Recipe, origin: Origin, folder: Path, progress: Progress
) -> tuple[Measured, tuple[str, ...]]:
    """Repeat the source's runs with the engines of a folder, and compare; NaN is a failure."""
    try:
        with ExitStack() as stack:
            with progress.part("gate: components"):
                pipeline = stack.enter_context(load(folder, hashes=False, example_images=True))
                errors = component_errors(pipeline, origin.gate, progress.within)
            measured: dict[str, Mapping[str, float]] = {**errors}
            measured["image"] = image_errors(pipeline, origin.gate.results, recipe.gate, progress)
    except (BackendError, GateError) as error:
        return {}, (str(error),)
    return measured, tuple(recipe.gate.failures(measured))


def _passes(rewritten: Mapping[str, Rewritten]) -> dict[str, int]:
    return {
        f"{name}/{kind}": count
        for name, made in rewritten.items()
        for kind, count in made.counts.items()
        if count
    }


def _sizes(
    rewritten: Mapping[str, Rewritten], manifest: Manifest, before: Manifest
) -> dict[str, dict[str, float]]:
    """Return nodes and bytes of each component before and after, all its parts together."""
    return {
        name: {
            "nodes_before": float(made.nodes[0]),
            "nodes_after": float(made.nodes[1]),
            "bytes_before": float(before.components[name].size),
            "bytes_after": float(sum(manifest.components[part].size for part in made.parts)),
        }
        for name, made in rewritten.items()
    }
