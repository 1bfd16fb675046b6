"""Optimization job: a request with its source and recipes, checked before work begins."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from latentforge.measure.prompts import read_prompts
from latentforge.measure.quality.metrics import Perceptual
from latentforge.optimize.graph_io import DENOISER, load_graph
from latentforge.optimize.passes import PASSES
from latentforge.optimize.quantize.nodes import check_float
from latentforge.optimize.recipe import Recipe, read_recipe
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.targets import TARGETS, Target
from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.kernels import instruction_sets
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.settings import Request, resolve
from latentforge.runtime.text import near_miss
from latentforge.runtime.validation import checked_path, plain

if TYPE_CHECKING:
    from latentforge.optimize.stage.sizing import Sizing

__all__ = ["STAGE", "OptimizeJob", "check_components", "check_request", "plan", "recipes_of"]

STAGE = "optimize"
"""Name of the stage in the history of a manifest."""


@dataclass(frozen=True, kw_only=True)
class OptimizeJob:
    """Work of one optimization.

    Attributes:
        source: the engine directory to read.
        manifest: of the source.
        request: as given.
        recipes: to carry out; of several, the fastest that passes its gate is taken.
        prompts: of the gate, then of the calibration.
        steps_timed: of the images that are timed; those of all others if None.
        sizing: sizes chosen for a budget; None before that, and without a budget.
    """

    source: Path
    manifest: Manifest
    request: OptimizeRequest
    recipes: Mapping[str, Recipe]
    prompts: tuple[str, ...]
    steps_timed: int | None = None
    sizing: Sizing | None = None

    @property
    def steps(self) -> int:
        """Steps of each image."""
        settings = cast("Request", self.request.settings)
        return resolve(self.manifest.defaults, self.prompts[0], settings).steps

    @property
    def timed_steps(self) -> int:
        """Steps of the images that are timed."""
        return self.steps if self.steps_timed is None else self.steps_timed

    @property
    def is_timed(self) -> bool:
        """True if source and results are timed."""
        return self.request.pairs > 0 and self.target.runs_on_cpu

    @property
    def target(self) -> Target:
        """Target that the result is for."""
        return self.request.target_entry

    @property
    def prompt_sets(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Prompts of the gate, and those of the calibration: different ones if there are enough."""
        recipes = self.recipes.values()
        images = max(recipe.gate.images for recipe in recipes)
        count = max((r.calibration.prompts for r in recipes if r.needs_calibration), default=0)
        gate = tuple(itertools.islice(itertools.cycle(self.prompts), images))
        rest = self.prompts[images:] or self.prompts
        return gate, rest[:count]


def check_request(request: OptimizeRequest) -> None:
    """Check everything that needs no source directory, so that a typo costs no export.

    Raises:
        SettingsError: no such target, recipe or gate, or they do not fit together.
    """
    recipes = recipes_of(request)
    for name, recipe in recipes.items():
        _check_recipe(name, recipe, request.target)
    _check_target(request, recipes)
    _check_networks(recipes.values())


def check_components(request: OptimizeRequest, components: Iterable[str]) -> None:
    """Check that recipes name components of a model, by the names of these.

    Raises:
        SettingsError: one names another.
    """
    known = ("default", "vae_encoder", *components)
    for name, recipe in recipes_of(request).items():
        if unknown := [c for c in recipe.precision if c not in known]:
            raise SettingsError(f"recipe {name}: no component {_mistaken(unknown, known)}")


def plan(source: Path, request: OptimizeRequest) -> OptimizeJob:
    """Check everything that can be checked before work begins.

    Raises:
        ManifestError: see optimize().
        SettingsError: see optimize().
    """
    recipes = recipes_of(request)
    manifest = Manifest.read(source)
    _check_source(source, manifest)
    check_request(request)
    check_components(request, manifest.components)
    _check_graphs(source, manifest, recipes.values())
    prompts = request.prompts or tuple(read_prompts())
    given = {name: plain(value) for name, value in request.settings.items()}
    resolve(manifest.defaults, prompts[0], cast("Request", given))
    return OptimizeJob(
        source=source,
        manifest=manifest,
        request=replace(request, settings=given),
        recipes=recipes,
        prompts=prompts,
    )


def _check_source(source: Path, manifest: Manifest) -> None:
    if done := [stage for stage in manifest.history if stage.name == STAGE]:
        recipe = done[-1].options.get("recipe")
        raise ManifestError(
            f"{source} was already optimized, with recipe {recipe}: start from the exported "
            "engines, and put everything into one recipe"
        )
    missing = [name for name in manifest.required_components if name not in manifest.components]
    if missing:
        raise ManifestError(
            f"{source} has no {missing[0]}, without which no images can be compared: export it "
            "without --components"
        )


def recipes_of(request: OptimizeRequest) -> dict[str, Recipe]:
    """Return the recipe, or its candidates, with the request's changes to gate and calibration."""
    recipe = read_recipe(request.recipe)
    recipes = {name: read_recipe(name) for name in recipe.candidates}
    recipes = {name: each for name, each in recipes.items() if _is_worthwhile(each, request)}
    recipes = recipes or {request.recipe: recipe}
    changed = {}
    for key, each in recipes.items():
        calibration = each.calibration
        if request.calibration_prompts is not None:
            calibration = msgspec.structs.replace(calibration, prompts=request.calibration_prompts)
        sensitivity = each.sensitivity or (
            recipe.sensitivity if each.precision_of(DENOISER) == "int8" else None
        )
        changed[Path(key).stem] = msgspec.structs.replace(
            each,
            gate=each.gate.with_overrides(request.gate),
            calibration=calibration,
            sensitivity=sensitivity,
        )
    return changed


def _is_worthwhile(candidate: Recipe, request: OptimizeRequest) -> bool:
    """Return False for a candidate in bfloat16 where nothing multiplies it faster than float32."""
    if not candidate.computes_bf16:
        return True
    sets = instruction_sets() if request.target_entry.bf16 else None
    return sets is not None and sets.multiplies_bf16


def _check_target(request: OptimizeRequest, recipes: Mapping[str, Recipe]) -> None:
    """Refuse an unknown target, and several recipes where they cannot be timed."""
    runs_here = request.target_entry.runs_on_cpu
    if len(recipes) > 1 and not (request.pairs and runs_here):
        raise SettingsError(
            f"recipe {request.recipe} chooses by measuring, which needs --repeats of 1 or more and "
            "a target that runs on this machine: name one recipe"
        )


def _check_networks(recipes: Iterable[Recipe]) -> None:
    """Open the networks of the gates, which nothing else needs before the end."""
    for network in {recipe.gate.network for recipe in recipes} - {None}:
        Perceptual(checked_path("gate: network", network))


def _check_recipe(name: str, recipe: Recipe, target: str) -> None:
    """Refuse unknown passes, and precisions that the target does not support."""
    if recipe.candidates:
        raise SettingsError(f"recipe {name} has candidates, so it cannot be a candidate itself")
    if unknown := [p for p in recipe.skip if p not in PASSES]:
        raise SettingsError(f"recipe {name}: no pass {_mistaken(unknown, PASSES)}")
    wrong = [
        c for c, precision in recipe.precision.items() if precision == "int8" and c != DENOISER
    ]
    if wrong:
        raise SettingsError(
            f"recipe {name}: {wrong[0]} cannot be int8, since only the denoiser is calibrated: "
            "int8-weights makes its file equally small"
        )
    _check_bf16(name, recipe, target)
    if target == "cuda" and recipe.precision_of(DENOISER) == "int8":
        raise SettingsError(
            "ONNX Runtime's CUDA provider has no 8-bit convolutions and would run them on the CPU: "
            "take --target tensorrt for int8, or the recipe fp16"
        )


def _check_bf16(name: str, recipe: Recipe, target: str) -> None:
    if not recipe.computes_bf16 or TARGETS[target].bf16:
        return
    remedies = {
        "cpu": "install a C++ compiler and run python -m latentforge.runtime.kernels, for it is "
        "latentforge's own kernels that compute in it, or take fp32",
        "openvino": "take fp32, and let the engines compute in bf16 by --option precision=bf16",
    }
    remedy = remedies.get(target, "take fp16")
    raise SettingsError(f"recipe {name}: bf16 is not built for {target} here: {remedy}")


def _check_graphs(source: Path, manifest: Manifest, recipes: Iterable[Recipe]) -> None:
    """Refuse foreign graphs and graphs that are already quantized."""
    for name, component in manifest.components.items():
        model = load_graph(name, component, source)
        if any(recipe.quantizes(name) for recipe in recipes):
            check_float(model)


def _mistaken(words: Sequence[str], options: Iterable[str]) -> str:
    return f"{words[0]!r}; {near_miss(words[0], options)}"
