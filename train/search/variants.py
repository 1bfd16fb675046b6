"""Deployed engines of structures: rewritten by a recipe, compiled, loaded, and timed in pairs.

A structure is applied to the exported graph of the whole UNet (surgery.py), which then takes the
way of every other engine: the recipe's passes for the target, its partition, and the target's
compiler. Nothing is exported again.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from time import perf_counter

import msgspec
import numpy as np
import onnx_ir as ir

from latentforge.export.models.searched_structure import Importance, SearchedStructure, Site
from latentforge.measure.hardware import available_threads, gpus
from latentforge.optimize.graph_io import DENOISER, free_graphs, load_graph, weight_files
from latentforge.optimize.recipe import Recipe, read_recipe
from latentforge.optimize.recipes import names
from latentforge.optimize.stage.component import Rewriter, save_part
from latentforge.optimize.targets import TARGETS, Target
from latentforge.runtime import backends
from latentforge.runtime.cleanups import at_forced_end
from latentforge.runtime.compile.plan import CompileRequest, check_sizes, plan_compilation
from latentforge.runtime.denoising.step_engines import ConditionedDenoiser, StepEngines
from latentforge.runtime.disk import check_space, naming_full_disk
from latentforge.runtime.engine import Engine
from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.files import copy_files, scratch_folder
from latentforge.runtime.machine import cpu_name
from latentforge.runtime.manifest import FileEntry, Manifest
from latentforge.runtime.shapes import Range, Sizes
from latentforge.runtime.tensor import Feeds, TensorSpec
from latentforge.runtime.text import near_miss
from latentforge.runtime.timings import Stopwatch
from latentforge.runtime.version import __version__
from latentforge.train.search.latency.records import Latency, StepSetting
from latentforge.train.search.surgery import restructure, signatures

__all__ = ["WHOLE", "DeployedStep", "Variants"]

WHOLE = SearchedStructure(choices={})
"""Structure of the whole UNet."""

_FOLDER = "engines-of-variants"
_TIMESTEP = 500.0
_WINDOW = 0.05  # seconds that an engine runs for in a turn
_PATIENCE = 4.0  # seconds for turns beyond those that were asked for
_SEED = 0


class DeployedStep:
    """Loaded engines of one structure's denoiser."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        """Take engines by component, which close() frees."""
        self._engines = engines
        self._step = StepEngines.of(engines)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs of the whole denoiser by name."""
        return self._step.inputs

    def condition(self, conditioning: Feeds, timesteps: Sequence[float]) -> ConditionedDenoiser:
        """Run the parts in front of the step; the result's predict() runs the step.

        Args:
            conditioning: all inputs except sample and timestep, one row per row of the sample.
            timesteps: of the steps to come.
        """
        return self._step.condition(conditioning, timesteps, Stopwatch())

    def close(self) -> None:
        """Free the engines."""
        for engine in self._engines.values():
            engine.session.close()


class Variants:
    """Engines of any structure of one UNet, made of its exported graph, one beside the whole one.

    Attributes:
        manifest: of the exported engines.
        sites: of the UNet.
        setting: under which steps are timed.
    """

    def __init__(
        self,
        engines: Path,
        target: str,
        recipe: str,
        work: Path,
        *,
        sites: Sequence[Site],
        importance: Importance | None = None,
        threads: int = 0,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Open exported engines.

        Args:
            engines: directory that export wrote.
            target: name in TARGETS.
            recipe: name of a recipe that needs no calibration, or path of its file.
            work: existing folder for the engines of one structure at a time.
            sites: of the UNet.
            importance: what halves keep; see restructure().
            threads: of an engine; 0 takes LATENTFORGE_THREADS, or all cores.
            size: height and width in pixels to time at; the manifest's default if None.

        Raises:
            ManifestError: the directory is damaged, or its denoiser is not as exported.
            SettingsError: there is no such target or recipe, or the recipe needs calibration.
        """
        self.manifest = Manifest.read(engines, hashes=False)
        self.sites = tuple(sites)
        self._engines, self._importance = engines, importance
        self._work = _emptied(work / _FOLDER)
        self._target, self._recipe = _target(target), _recipe(recipe)
        self._check()
        defaults = self.manifest.defaults
        self.setting = _setting(
            self.manifest, target, recipe, size or (defaults.height, defaults.width), threads
        )
        check_sizes(self.manifest.latent, self._sizes)
        self._whole: DeployedStep | None = None

    def __enter__(self) -> "Variants":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the whole UNet's engine and graph."""
        if self._whole is not None:
            self._whole.close()
            self._whole = None
        if "_model" in vars(self):
            weights = weight_files(self._model)
            del self._model
            free_graphs(weights)

    def _check(self) -> None:
        """Check that the denoiser is one graph, as export writes it."""
        component = self.manifest.components.get(DENOISER)
        parts = [name for name in self.manifest.components if name.startswith(f"{DENOISER}_")]
        if component is None or parts or component.backend != "onnxruntime":
            raise ManifestError(
                f"{self._engines} does not have the UNet as one exported graph: name a directory "
                "that latentforge export wrote"
            )

    @cached_property
    def _model(self) -> ir.Model:
        return load_graph(DENOISER, self.manifest.components[DENOISER], self._engines)

    @cached_property
    def signatures(self) -> dict[str, str]:
        """Texts by name of the site, equal for sites whose layers have equal shapes."""
        return signatures(self._model.graph, self.sites)

    @contextmanager
    def open(self, structure: SearchedStructure) -> Iterator[DeployedStep]:
        """Yield the engines of a structure, which are built for that and deleted afterwards.

        Raises:
            BackendError: the target's library refuses them.
            DeviceError: the target needs a device that this machine lacks.
        """
        with self._folder(structure.key) as folder:
            step = self._load(*self._build(structure, folder))
            try:
                yield step
            finally:
                step.close()

    def measure(
        self,
        structures: Sequence[SearchedStructure],
        *,
        repeats: int,
        report: Callable[[SearchedStructure, Latency], None] | None = None,
    ) -> list[Latency]:
        """Time a step of structures, each in turns with the whole UNet.

        Args:
            structures: to time.
            repeats: turns of each, or more of short steps while the ratio's interval is wide.
            report: called with each as soon as it is measured.
        """
        latencies = []
        for structure in structures:
            with self.open(structure) as step:
                latency = self._paired(step, repeats)
            latencies.append(latency)
            if report is not None:
                report(structure, latency)
        return latencies

    def _paired(self, step: DeployedStep, repeats: int) -> Latency:
        whole, own = self._runner(self._whole_step()), self._runner(step)
        for run in (whole, own):
            _window(run)
        end, turns = perf_counter() + _PATIENCE, list[tuple[float, float]]()
        while len(turns) < repeats or (perf_counter() < end and not Latency.of(turns).is_precise):
            first, second = (own, whole) if len(turns) % 2 else (whole, own)
            seconds = {run: _window(run) for run in (first, second)}  # neither is always the first
            turns.append((seconds[whole], seconds[own]))
        return Latency.of(turns)

    def _whole_step(self) -> DeployedStep:
        """Return the whole UNet's engines, which stay loaded."""
        if self._whole is None:
            with self._folder("whole") as folder:  # its files are loaded, or mapped
                self._whole = self._load(*self._build(WHOLE, folder))
        return self._whole

    def _runner(self, step: DeployedStep) -> Callable[[], object]:
        """Return a function that runs one step on random inputs, the same for every structure."""
        random, sizes = np.random.default_rng(_SEED), self._dimensions(step.inputs)
        arrays = {
            name: random.standard_normal(spec.resolve(sizes)).astype(spec.dtype)
            for name, spec in sorted(step.inputs.items())
            if name != "timestep"
        }
        sample = arrays.pop("sample")
        denoiser = step.condition(arrays, [_TIMESTEP])
        return lambda: denoiser.predict(sample, _TIMESTEP)

    def _dimensions(self, inputs: Mapping[str, TensorSpec]) -> dict[str, int]:
        """Return the sizes of the free dimensions of the denoiser's inputs."""
        setting, scale = self.setting, self.manifest.latent.downscale
        rows, _, height, width = inputs["sample"].shape
        sizes = (setting.rows, setting.height // scale, setting.width // scale)
        named = zip((rows, height, width), sizes, strict=True)
        return {name: size for name, size in named if isinstance(name, str)}

    @property
    def _sizes(self) -> Sizes:
        height, width = Range.of(self.setting.height), Range.of(self.setting.width)
        rows = Range(1, self.setting.rows, self.setting.rows)
        return Sizes(height=(height,), width=(width,), batch=(rows,))

    @contextmanager
    def _folder(self, name: str) -> Iterator[Path]:
        """Make a folder for the engines of one structure, and delete it after the block."""
        with scratch_folder(self._work, name) as folder, at_forced_end(partial(_remove, folder)):
            yield folder

    def _build(self, structure: SearchedStructure, folder: Path) -> tuple[Manifest, Path]:
        """Write the engines of a structure into a folder, and return their manifest and folder."""
        component = self.manifest.components[DENOISER]
        check_space(folder, int(component.size * (1 + self._compiled_space)))
        model = self._model.clone()
        restructure(model, structure, self.sites, self._importance)
        rewriter = Rewriter(recipe=self._recipe, target=self._target, feeds={})
        made = rewriter.rewrite(DENOISER, model, component)
        component = msgspec.structs.replace(component, precision=made.precision)
        with naming_full_disk(folder):
            parts = {
                name: save_part(name, part, component, folder)
                for name, part in made.parts.items()
                if part is not None
            }
            manifest = msgspec.structs.replace(self.manifest, components=parts, acceleration=None)
            del model, made
            free_graphs(())
            if self._target.needs_compile:
                manifest = self._compiled(manifest, folder)
        return manifest, folder

    @property
    def _compiled_space(self) -> float:
        """Bytes of compiled engines for each byte of their graphs."""
        target = self._target
        return backends.BACKENDS[target.backend].space if target.needs_compile else 0.0

    def _compiled(self, manifest: Manifest, folder: Path) -> Manifest:
        """Compile graphs of a folder for the target."""
        tokenizers = (entry.file for entry in manifest.tokenizers.values())
        copy_files(tokenizers, self._engines, folder)
        manifest.write(folder)
        backend = self._target.backend
        sizes = Sizes() if backends.BACKENDS[backend].any_size else self._sizes
        plan = plan_compilation(folder, CompileRequest(backend=backend, sizes=sizes))
        components, library = {}, backends.get(backend)
        for task in plan.tasks:
            path = folder / f"{task.name}.{backend}{library.SUFFIX}"
            onnx, options = folder / task.source.file, dict(plan.options)
            device = library.compile(onnx, path, task.component, options, _unreported)
            entry = msgspec.structs.asdict(FileEntry.of(path, folder))
            changes = {**entry, "data": (), "device": device}
            components[task.name] = msgspec.structs.replace(task.component, **changes)
        return msgspec.structs.replace(manifest, components=components)

    def _load(self, manifest: Manifest, folder: Path) -> DeployedStep:
        """Load engines as the runtime does, with the setting's threads."""
        engines: dict[str, Engine] = {}
        for name, component in manifest.components.items():
            options = {"threads": self.setting.threads, "yield_cores": True}
            spin = name == DENOISER
            engines[name] = Engine.load(name, component, folder, options, spin=spin)
        return DeployedStep(engines)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _emptied(folder: Path) -> Path:
    """Return a folder without the engines that a killed process has left."""
    _remove(folder)
    with naming_full_disk(folder):
        folder.mkdir()
    return folder


def _unreported(activity: str, done: int, total: int) -> None:
    """Show no progress of a build: the search shows its own."""


def _window(run: Callable[[], object]) -> float:
    """Return the median seconds of the runs within a window of a fixed time.

    The first of several brings the weights back into the caches, and does not count.
    """
    end, first, runs = perf_counter() + _WINDOW, _seconds(run), list[float]()
    while perf_counter() < end:
        runs.append(_seconds(run))
    return median(runs or [first])


def _seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def _setting(
    manifest: Manifest, target: str, recipe: str, size: tuple[int, int], threads: int
) -> StepSetting:
    """Return the setting of engines on this machine."""
    component, backend = manifest.components[DENOISER], TARGETS[target].backend
    content = "".join(entry.sha256 for entry in component.files)
    on_gpu = backends.BACKENDS[backend].gpu
    return StepSetting(
        engines=hashlib.sha256(content.encode()).hexdigest(),
        target=target,
        recipe=_recipe_text(recipe),
        height=size[0],
        width=size[1],
        rows=2 if manifest.defaults.guidance_scale > 1 else 1,
        threads=threads or available_threads(),
        processor=cpu_name(),
        gpu=", ".join(name for _, name in gpus()) if on_gpu else "",
        libraries={
            "latentforge": __version__,
            backends.BACKENDS[backend].library: backends.version(backend),
        },
    )


def _recipe_text(name: str) -> str:
    """Return the name of a recipe; that of a file with the hash of its content."""
    if name in names():
        return name
    return f"{name} {hashlib.sha256(msgspec.json.encode(read_recipe(name))).hexdigest()[:16]}"


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise SettingsError(f"no target {name!r}; {near_miss(name, list(TARGETS))}")
    return TARGETS[name]


def _recipe(name: str) -> Recipe:
    """Return a recipe that can be carried out on any structure without recorded inputs."""
    recipe = read_recipe(name)
    if recipe.candidates or recipe.needs_calibration:
        reason = "chooses among others" if recipe.candidates else "needs calibration"
        raise SettingsError(
            f"recipe {name} {reason}, for which a search has no time: search with fp32, fp16 or "
            f"int8-weights, and build the student with {name}"
        )
    return recipe
