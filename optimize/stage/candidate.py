"""One recipe, carried out: engines in a folder, and how far they are from those they came of."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentforge.optimize.gate.comparison import component_errors, image_errors
from latentforge.optimize.gate.gate import Measured
from latentforge.optimize.graph_io import DENOISER, load_graph
from latentforge.optimize.quantize.sensitivity import (
    Denoise,
    LayerSensitivity,
    measure_sensitivity,
    select_sensitive,
)
from latentforge.optimize.recipe import Recipe
from latentforge.optimize.stage.component import Rewriter, Rewritten, save_part
from latentforge.optimize.stage.recording import CallRecording, spread
from latentforge.optimize.targets import Target
from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.errors import BackendError, GateError
from latentforge.runtime.files import copy_files
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import CalibrationSchedule, Component, Manifest
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.progress import Progress
from latentforge.runtime.tensor import Feeds

__all__ = ["RecipeCandidate", "Origin", "make"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What candidates are made of and compared with.

    Attributes:
        directory: the engines to start from.
        manifest: what it says.
        target: what the result is for.
        gate: pictures that the gate compares, and every call that made them.
        calibration: the same of other prompts, for ranges and scores; None if nobody asks.
        schedule: that of these runs.
    """

    directory: Path
    manifest: Manifest
    target: Target
    gate: CallRecording
    calibration: CallRecording | None
    schedule: CalibrationSchedule


@dataclass(frozen=True, kw_only=True)
class RecipeCandidate:
    """A recipe's result.

    Attributes:
        folder: where its engines lie.
        manifest: of them, without a history of this stage.
        passes: rewrites by component and pass, as COMPONENT/PASS.
        measured: figures by component, or ``image``.
        layers: how sensitive each was, where the recipe asked, the worst first.
        kept: of them, those that stayed in float.
        failures: what the gate found wanting.
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
    """Carry out a recipe in a folder, which holds nothing yet, and judge the result there.

    Where the target's operators do not run here, a twin without them is judged in its place, and
    deleted.
    """
    layers, kept = _scan(recipe, origin, progress)
    if kept:
        settings = msgspec.structs.replace(recipe.int8, exclude=(*recipe.int8.exclude, *kept))
        recipe = msgspec.structs.replace(recipe, int8=settings)
    rewriter = Rewriter(recipe=recipe, target=origin.target, feeds=_feeds(recipe, origin))
    manifest, rewritten = _write(rewriter, origin, folder, progress)
    judged = folder
    if not origin.target.runs_on_cpu:
        judged = folder / "twin"
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


def _scan(
    recipe: Recipe, origin: Origin, progress: Progress
) -> tuple[tuple[LayerSensitivity, ...], tuple[str, ...]]:
    """Measure each int8 layer of the UNet by itself, if the recipe asks, and choose the worst."""
    if recipe.sensitivity is None or recipe.precision_of(DENOISER) != "int8":
        return (), ()
    assert origin.calibration is not None
    with progress.part("unet: each layer by itself"):
        model = load_graph(DENOISER, origin.manifest.components[DENOISER], origin.directory)
        rewriter = Rewriter(recipe=recipe, target=origin.target, feeds={})
        rewriter.fuse(model, "int8", half=False)
        feeds, form = _feeds(recipe, origin)[DENOISER], origin.target.form
        slot = _SessionSlot()
        with load(origin.directory, hashes=False, wrap_session=slot.wrap) as pipeline:
            latents = _latents(
                pipeline, slot, origin.calibration.results[0], recipe.sensitivity.steps
            )
            layers = measure_sensitivity(model, feeds, recipe.int8, latents, form=form)
    return tuple(layers), select_sensitive(layers, recipe.sensitivity)


class _SessionSlot:
    """Session of the denoiser that can be exchanged between runs of a pipeline."""

    session: Session

    def wrap(self, name: str, session: Session) -> Session:
        """Put this in the place of the denoiser's session: see load()."""
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


def _latents(pipeline: Pipeline, slot: _SessionSlot, reference: Result, steps: int) -> Denoise:
    """What makes the final latents of a picture, in few steps, with a UNet of the scan's."""
    settings = replace(reference.settings, sampler="euler", steps=steps)

    def latents(session: Session) -> NDArray[np.float32]:
        slot.session = session
        return pipeline.run(settings).latents

    return latents


def _feeds(recipe: Recipe, origin: Origin) -> dict[str, list[Any]]:
    """Recorded inputs by component, so many as the recipe wants, spread over all steps."""
    if origin.calibration is None:
        return {}
    return {
        name: [call.feeds for call in spread(calls, recipe.calibration.samples)]
        for name, calls in origin.calibration.calls.items()
    }


def _write(
    rewriter: Rewriter, origin: Origin, folder: Path, progress: Progress
) -> tuple[Manifest, dict[str, Rewritten]]:
    """Rewrite every component into a folder, with a manifest that can be loaded."""
    components: dict[str, Component] = {}
    rewritten: dict[str, Rewritten] = {}
    for name, component in origin.manifest.components.items():
        with progress.part(f"{name}: rewrite"):
            made = rewriter.rewrite(name, load_graph(name, component, origin.directory), component)
            calibration = origin.schedule if made.precision == "int8" else None
            component = msgspec.structs.replace(
                component, precision=made.precision, calibration=calibration
            )
            for part, graph in made.parts.items():
                assert graph is not None
                components[part] = save_part(part, graph, component, folder)
        rewritten[name] = replace(made, parts=dict.fromkeys(made.parts))  # lets go of the weights
    tokenizers = (entry.file for entry in origin.manifest.tokenizers.values())
    copy_files(tokenizers, origin.directory, folder)
    # a plan was judged with other engines
    manifest = msgspec.structs.replace(
        origin.manifest, components=components, quality={}, acceleration=None
    )
    manifest.write(folder)
    return manifest, rewritten


def _judge(
    recipe: Recipe, origin: Origin, folder: Path, progress: Progress
) -> tuple[Measured, tuple[str, ...]]:
    """Run what lies in a folder as the original was run, and compare; NaN is a failure too."""
    try:
        with load(folder, hashes=False) as pipeline:
            measured: dict[str, Mapping[str, float]] = {**component_errors(pipeline, origin.gate)}
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
    """Nodes and bytes of each component before and after, all its parts together."""
    return {
        name: {
            "nodes_before": float(made.nodes[0]),
            "nodes_after": float(made.nodes[1]),
            "bytes_before": float(before.components[name].size),
            "bytes_after": float(sum(manifest.components[part].size for part in made.parts)),
        }
        for name, made in rewritten.items()
    }
