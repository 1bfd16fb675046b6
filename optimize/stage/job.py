"""What one optimization works on, with everything checked that can be before work begins."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from latentforge.measure.prompts import read_prompts
from latentforge.optimize.graph_io import DENOISER, load_graph
from latentforge.optimize.passes import PASSES
from latentforge.optimize.quantize.nodes import check_float
from latentforge.optimize.recipe import Recipe, read_recipe
from latentforge.optimize.targets import TARGETS, Target
from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.text import near_miss

__all__ = ["STAGE", "OptimizeJob", "plan"]

STAGE = "optimize"
"""Its name in a manifest's history."""

_MOST_REPEATS = 1000


@dataclass(frozen=True, kw_only=True)
class OptimizeJob:
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

    @property
    def target(self) -> Target:
        """What the result is for."""
        return TARGETS[self.backend]

    @property
    def shares(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The gate's prompts, and those for calibration: others, unless there are too few."""
        recipes = self.recipes.values()
        images = max(recipe.gate.images for recipe in recipes)
        wanted = max((r.calibration.prompts for r in recipes if r.needs_calibration), default=0)
        gate = tuple(itertools.islice(itertools.cycle(self.prompts), images))
        rest = self.prompts[images:] or self.prompts
        return gate, rest[:wanted]


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
) -> OptimizeJob:
    """Check everything that can be before work begins; see optimize() for arguments and errors."""
    if backend not in TARGETS:
        raise SettingsError(f"no target {backend!r}; {near_miss(backend, TARGETS)}")
    if not 0 <= repeats <= _MOST_REPEATS:
        raise SettingsError(f"repeats is a number from 0 to {_MOST_REPEATS}, not {repeats}")
    manifest = Manifest.read(source)
    _check_source(source, manifest)
    recipes = _recipes(recipe, gate, calibrate)
    for name, each in recipes.items():
        _check_recipe(name, each, backend, manifest)
    _check_graphs(source, manifest, recipes.values())
    if len(recipes) > 1 and not (repeats and TARGETS[backend].runs_on_cpu):
        raise SettingsError(
            f"recipe {recipe} chooses by measuring, which needs --repeats from 1 up and a target "
            "that runs here: name one recipe"
        )
    return OptimizeJob(
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
    if missing := [
        name for name in manifest.required_components if name not in manifest.components
    ]:
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
        sensitivity = each.sensitivity or (
            recipe.sensitivity if each.precision_of(DENOISER) == "int8" else None
        )
        changed[Path(key).stem] = msgspec.structs.replace(
            each,
            gate=each.gate.with_overrides(gate),
            calibration=calibration,
            sensitivity=sensitivity,
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
    wrong = [
        c for c, precision in recipe.precision.items() if precision == "int8" and c != DENOISER
    ]
    if wrong:
        raise SettingsError(
            f"recipe {name}: {wrong[0]} cannot be int8, only the unet is calibrated: "
            "int8-weights makes its file as small"
        )
    if backend == "cuda" and recipe.precision_of(DENOISER) == "int8":
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
    return f"{words[0]!r}; {near_miss(words[0], known)}"
