"""Compile stage: reads an engine directory of ONNX graphs and writes one of native engines.

plan.py has the request and the plan, build_process.py the build of one engine, verify.py the
comparison with the source.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from latentforge.runtime import backends
from latentforge.runtime.annotations import checked_arguments
from latentforge.runtime.backends import CACHE
from latentforge.runtime.compile.build_process import BuildOrder, BuiltEngine, build
from latentforge.runtime.compile.plan import (
    STAGE,
    CompilePlan,
    CompileRequest,
    CompileTask,
    plan_compilation,
)
from latentforge.runtime.compile.verify import compare
from latentforge.runtime.disk import check_space
from latentforge.runtime.errors import BackendError, DeviceError, ManifestError, TargetError
from latentforge.runtime.files import check_target, copy_files, staged_directory
from latentforge.runtime.manifest import Component, FileEntry, Manifest, Stage
from latentforge.runtime.progress import Progress

__all__ = ["compile_engines", "compile_into"]


@checked_arguments
def compile_engines(source: Path, target: Path, request: CompileRequest) -> Manifest:
    """Compile the graphs of a directory into another one, and compare an image of both.

    Args:
        source: engine directory that export or optimize wrote.
        target: engine directory to write, completely or not at all.
        request: backends, options and sizes.

    Raises:
        ManifestError: the source is damaged, or compiled already.
        SettingsError: there is no such option or component, or the backend lacks operators.
        ShapeError: the model or its graphs cannot have one of the sizes.
        BackendError: a backend is not installed, or refuses a graph.
        GateError: the engines' image differs; they are kept as target.rejected.
        TargetError: the directory cannot be written.
    """
    check_target(target, overwrite=request.overwrite)
    if source.resolve() == target.resolve():
        raise TargetError(f"{target} is the source directory: name another")
    plan = plan_compilation(source, request, origin={"source": str(source)})
    with staged_directory(target, overwrite=request.overwrite) as directory:
        caches = (cache.relative_to(target) for cache in target.glob(f"engines/*/timing{CACHE}"))
        copy_files(map(str, caches), target, directory)  # of TensorRT, to be faster this time
        return compile_into(plan, directory)


def compile_into(plan: CompilePlan, directory: Path) -> Manifest:
    """Carry out a plan in a staged directory: see compile_engines()."""
    start, quiet = time.perf_counter(), plan.request.quiet
    if not quiet:
        print(plan, file=sys.stderr, flush=True)
    check_space(directory, plan.space)
    components, measured = {}, {}
    with Progress(len(plan.tasks) + 1, quiet=quiet) as progress:
        for task in plan.tasks:
            with progress.part(f"{task.name}: {task.component.backend}"):
                component, built = _build(task, plan.source, directory, progress)
            components[task.name] = component
            measured[task.name] = {
                "bytes_before": float(task.source.size),
                "bytes_after": float(component.size),
                "build_seconds": built.seconds,
                "build_memory": float(built.peak_memory),
            }
        tokenizers = (entry.file for entry in plan.manifest.tokenizers.values())
        copy_files(tokenizers, plan.source, directory)
        manifest = msgspec.structs.replace(plan.manifest, components=components)
        manifest.write(directory)
        with progress.part("comparing an image of one step"):
            quality = _compare(plan, directory, progress)
    history = (*manifest.history, _history(plan, {**measured, **quality}, start))
    manifest = msgspec.structs.replace(manifest, history=history, quality=quality)
    manifest.write(directory)
    return manifest


def _build(
    task: CompileTask, source: Path, directory: Path, progress: Progress
) -> tuple[Component, BuiltEngine]:
    """Build one engine under engines/BACKEND, and add its files to its component."""
    backend = task.component.backend
    folder = directory / "engines" / backend
    names = [Path(entry.file).name for entry in task.source.data]
    if any((folder / name).exists() for name in names):  # another component's, of the same name
        folder /= task.name
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*"))
    path = folder / f"{task.name}{backends.get(backend).SUFFIX}"
    order = BuildOrder(
        onnx=str(source / task.source.file),
        target=str(path),
        component=msgspec.structs.replace(task.component, file=task.source.file),
    )
    built = build(order, progress.within)
    if not path.is_file():
        raise BackendError(f"{backend} wrote no engine for {task.name}")
    new = (file for file in set(folder.rglob("*")) - before - {path} if file.is_file())
    data = sorted(p for p in new if CACHE not in (p.suffix, p.parent.suffix))  # they will change
    entry = msgspec.structs.asdict(FileEntry.of(path, directory))
    entries = tuple(FileEntry.of(file, directory) for file in data)
    component = msgspec.structs.replace(task.component, **entry, data=entries, device=built.device)
    return component, built


def _compare(
    plan: CompilePlan, directory: Path, progress: Progress
) -> dict[str, Mapping[str, float]]:
    """Compare an image of one step with the source's, if both can run on this machine."""
    try:
        return {"image": compare(plan.source, directory)}
    except DeviceError as error:
        progress.note(f"built, but not run on this machine: {error}")
    except ManifestError:
        progress.note("built, but not run: an image needs more components")
    return {}


def _history(plan: CompilePlan, measured: Mapping[str, Mapping[str, float]], start: float) -> Stage:
    selected = {task.name: task.component.backend for task in plan.tasks}
    libraries = sorted(set(selected.values()) - {"null"})
    options = {"options": dict(plan.options), **plan.request.sizes.asdict()}
    return Stage.ended(
        STAGE,
        start,
        {**plan.origin, "backends": selected, **options},
        tools={name: backends.version(name) for name in libraries},
        measured=measured,
    )
