"""Builds: export, optimize and compile a checkpoint in one go, and search for an acceleration plan.

The stages only meet on disk; this module combines them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from latentforge.accuracies import demo_accuracies
from latentforge.build_plan import BuildPlan, CheckpointSize, PlannedStage, StageEstimates
from latentforge.export.checkpoint import DEMO, Checkpoint, open_checkpoint
from latentforge.export.families import family_of
from latentforge.export.onnx import Dimensions
from latentforge.export.reference.devices import require_device
from latentforge.export.stage import ExportRequest, export
from latentforge.measure.quality.inputs import Accuracy
from latentforge.optimize.search.backends import select_backends, tune_rows
from latentforge.optimize.search.request import SearchRequest, check_search
from latentforge.optimize.search.search import accelerate
from latentforge.optimize.stage.job import OptimizeJob, check_components, check_request
from latentforge.optimize.stage.job import plan as plan_optimization
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.stage.sizing import Sizing, fit_alike
from latentforge.optimize.stage.stage import optimize_into, sized
from latentforge.optimize.targets import TARGETS
from latentforge.runtime import backends, sampling
from latentforge.runtime.annotations import check_fields, checked_arguments
from latentforge.runtime.compile.plan import (
    CompileRequest,
    check_sizes,
    parse_options,
    plan_compilation,
)
from latentforge.runtime.compile.stage import compile_into
from latentforge.runtime.errors import BackendError, GateError, SettingsError
from latentforge.runtime.files import check_target, scratch_folder, staged_directory
from latentforge.runtime.kernels import library
from latentforge.runtime.machine import MemoryMeter, available_memory, total_memory
from latentforge.runtime.manifest import Manifest, Stage
from latentforge.runtime.progress import Progress
from latentforge.runtime.shapes import Range, Sizes
from latentforge.runtime.text import near_miss

__all__ = [
    "AUTO",
    "STAGE",
    "BuildPlan",
    "BuildRequest",
    "build",
    "dimensions",
    "estimate",
    "optimize_and_compile",
    "with_demo_metrics",
]

STAGE = "build"
"""Name of the entry about the whole build in the history of a manifest."""

AUTO = "auto"
"""Target that stands for the fastest backend of each component on this machine."""

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
        device: where the export runs torch: see ExportRequest. The other stages run none.
    """

    optimization: OptimizeRequest = field(default_factory=OptimizeRequest)
    sampler: str | None = None
    sizes: Sizes = field(default_factory=Sizes)
    options: tuple[str, ...] = ()
    search: SearchRequest | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)


_DEFAULT = BuildRequest()


@checked_arguments
def build(
    checkpoint: str,
    target: Path,
    request: BuildRequest = _DEFAULT,
    *,
    plan: BuildPlan | None = None,
) -> Manifest:
    """Build engines from a checkpoint, ready to run.

    Args:
        checkpoint: a diffusers directory, one that optimum-onnx exported, a hub id, or ``demo``.
        target: the engine directory to write; it appears complete or not at all.
        request: backend, recipe, sizes, and search for an acceleration plan.
        plan: of estimate(), if the caller has made it.

    Returns:
        The manifest that was written.

    Raises:
        LatentforgeError: any error of export, optimize and compile.
    """
    start, options = time.perf_counter(), request.optimization
    _check(request)
    check_target(target, overwrite=options.overwrite)
    plan = plan or estimate(checkpoint, request)
    plan.check()
    with (
        MemoryMeter() as meter,
        staged_directory(target, overwrite=options.overwrite) as directory,
    ):
        manifest, predicted = _build_into(checkpoint, directory, request, start)
        stage = _record(plan, predicted, meter.peak, start)
        manifest = msgspec.structs.replace(manifest, history=(*manifest.history, stage))
        manifest.write(directory)
    return manifest


def _build_into(
    checkpoint: str, directory: Path, request: BuildRequest, start: float
) -> tuple[Manifest, float | None]:
    """Carry out all stages, and return the seconds predicted after the export, if a step was timed.

    Args:
        checkpoint: see build().
        directory: staged.
        request: see build().
        start: time.perf_counter() at the start of the build.
    """
    options, exported = request.optimization, directory / "exported"
    fixed = ExportRequest(
        dimensions=dimensions(request.sizes),
        sampler=request.sampler,
        device=request.device,
        quiet=options.quiet,
    )
    try:
        source = export(checkpoint, exported, fixed)
        free = replace(request, sizes=_free_sizes(request.sizes))
        estimates = _estimates(CheckpointSize.of_engines(source), free)
        jobs = _jobs(exported, free, estimates, time.perf_counter() - start)
        predicted = _predicted(jobs, estimates, time.perf_counter() - start)
        manifest = _carry_out(jobs, directory, free)
    finally:
        shutil.rmtree(exported, ignore_errors=True)
    if options.pairs:
        manifest = tune_rows(directory, repeats=_pairs(jobs), quiet=options.quiet)
    if request.search is not None:
        manifest = accelerate(directory, request.search, quiet=options.quiet)
    return manifest, predicted


def optimize_and_compile(exported: Path, directory: Path, request: BuildRequest) -> Manifest:
    """Optimize and compile exported engines into a staged directory: see build().

    Args:
        exported: engines that export wrote.
        directory: existing, without engines.
        request: its sizes are those that the graphs are not fixed to.
    """
    source = Manifest.read(exported, hashes=False)  # plan_optimization() compares the hashes
    estimates = _estimates(CheckpointSize.of_engines(source), request)
    return _carry_out(_jobs(exported, request, estimates, 0.0), directory, request)


def _jobs(
    exported: Path, request: BuildRequest, estimates: StageEstimates, elapsed: float
) -> dict[str, OptimizeJob]:
    """Return the optimization of each target, all in the sizes that keep to the budget together."""
    options = replace(request.optimization, shares=len(estimates.targets))
    if options.budget is not None:
        options = replace(options, reserved=elapsed + estimates.after(estimates.cost))
    jobs: dict[str, OptimizeJob] = {}
    sizing: Sizing | None = None
    for name in estimates.targets:
        job = plan_optimization(exported, replace(options, target=name))
        if sizing is None:
            with Progress(1, quiet=options.quiet) as progress:
                job = sized(job, progress)
            sizing = job.sizing
        else:
            job = fit_alike(job, sizing)
        jobs[name] = job
    return jobs


def _predicted(
    jobs: Mapping[str, OptimizeJob], estimates: StageEstimates, elapsed: float
) -> float | None:
    """Return the seconds of the whole build by the step that was measured; None if none was."""
    sizings = [job.sizing for job in jobs.values() if job.sizing is not None]
    if not sizings:
        return None
    after = replace(estimates, request=next(iter(jobs.values())).request).after(sizings[0].cost)
    return elapsed + sum(sizing.seconds for sizing in sizings) + after


def _pairs(jobs: Mapping[str, OptimizeJob]) -> int:
    """Return the pairs to time, which the budget may have reduced."""
    return next(iter(jobs.values())).request.pairs


def _record(plan: BuildPlan, predicted: float | None, peak: int, start: float) -> Stage:
    """Return the history entry of the whole build: what was predicted, and what it took."""
    estimated = {"seconds": round(plan.seconds, 1), "memory": plan.memory, "disk": plan.disk}
    options = {"budget": plan.budget, "estimated": estimated}
    if predicted is not None:
        options["predicted_seconds"] = round(predicted, 1)
    return Stage.ended(STAGE, start, options, measured={"build": {"peak_memory": float(peak)}})


def _carry_out(jobs: Mapping[str, OptimizeJob], directory: Path, request: BuildRequest) -> Manifest:
    """Optimize and compile for each target, and select the fastest components of several."""
    options = request.optimization
    if options.target != AUTO:
        return _build_target(jobs[options.target], directory, request)
    built, refused = dict[str, Path](), dict[str, str]()
    with scratch_folder(directory, "work") as work:
        for name, job in jobs.items():
            (work / name).mkdir()
            try:
                _build_target(job, work / name, request)
                built[name] = work / name
            except (BackendError, GateError) as error:
                refused[name] = str(error)
        if not built:
            raise GateError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
        return select_backends(
            built, directory, refused=refused, repeats=_pairs(jobs) or 1, quiet=options.quiet
        )


def _build_target(job: OptimizeJob, directory: Path, request: BuildRequest) -> Manifest:
    """Optimize for one target, and compile if its backend needs it or sizes or options are set."""
    target = job.target
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
        origin = {"target": job.request.target}
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


# checks before any work


def _check(request: BuildRequest) -> None:
    """Check what needs no checkpoint, so that a typo does not cost an export."""
    require_device(request.device)
    for name in _targets(request):
        check_request(replace(request.optimization, target=name))
        parse_options(request.options, [TARGETS[name].backend])
    if request.sampler is not None:
        sampling.get(request.sampler)
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


@checked_arguments
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


@checked_arguments
def estimate(checkpoint: str, request: BuildRequest = _DEFAULT) -> BuildPlan:
    """Estimate the work of build() from the headers of the checkpoint, without loading weights.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of an unsupported kind.
        SettingsError: no such target or recipe, or the search cannot be done.
        DeviceError: torch finds no GPU, and the request names one.
    """
    _check(request)
    return _plan(open_checkpoint(checkpoint), request)


def _plan(source: Checkpoint, request: BuildRequest) -> BuildPlan:
    family, options = family_of(source), request.optimization
    model = family.plan(source)
    check_sizes(model.latent, request.sizes)
    check_components(options, [component.name for component in model.components])
    stages = _estimates(CheckpointSize.of(source, family), request)
    planned, free = tuple(_stages(stages, request)), available_memory()
    memory = max(stage.memory for stage in planned)
    return BuildPlan(
        title=f"{source.name} ({family.name})",
        weights=stages.size.weights,
        stages=planned,
        budget=options.budget,
        free_memory=free,
        total_memory=total_memory(),
        warnings=tuple(_warnings(stages.targets, memory, free)),
    )


def _estimates(size: CheckpointSize, request: BuildRequest) -> StageEstimates:
    targets = _targets(request)
    return StageEstimates(
        size=size,
        request=request.optimization,
        targets=tuple(targets),
        compiled=tuple(name for name in targets if _is_compiled(name, request.sizes)),
    )


def _is_compiled(target: str, sizes: Sizes) -> bool:
    return TARGETS[target].needs_compile or bool(sizes.asdict())


def _stages(estimates: StageEstimates, request: BuildRequest) -> Iterator[PlannedStage]:
    sizes = ", ".join(f"{key} {value}" for key, value in request.sizes.asdict().items())
    yield estimates.export()
    yield from map(estimates.optimize, estimates.targets)
    yield from (estimates.compile(name, sizes) for name in estimates.compiled)
    yield from estimates.choose()
    if request.search is not None:
        yield PlannedStage(
            name="search",
            text=f"search an acceleration plan, outside of the budget: {request.search}",
            seconds=None,
            memory=0,
        )


def _warnings(targets: Sequence[str], memory: int, free: int | None) -> Iterator[str]:
    if library() is None and "cpu" in targets:
        yield (
            "latentforge's own CPU kernels were not compiled when it was installed, so engines "
            "will be slower: with a C++ compiler, run python -m latentforge.runtime.kernels first"
        )
    if free is not None and memory > free:
        yield "that is more memory than is free: close other programs, or expect the build to fail"
