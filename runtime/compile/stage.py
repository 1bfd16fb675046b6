"""The compile stage: an engine directory of graphs in, one of native engines out."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from latentforge.runtime import backends
from latentforge.runtime.backends import BACKENDS, CACHE, ONLY_AT_LOAD
from latentforge.runtime.compile.build_process import BuildOrder, BuiltEngine, build
from latentforge.runtime.compile.verify import compare
from latentforge.runtime.errors import (
    BackendError,
    DeviceError,
    ManifestError,
    SettingsError,
    ShapeError,
    TargetError,
)
from latentforge.runtime.files import (
    check_space,
    check_target,
    copy_files,
    staged_directory,
)
from latentforge.runtime.history import stage_record
from latentforge.runtime.machine import available_memory
from latentforge.runtime.manifest import Component, FileEntry, Manifest, Stage
from latentforge.runtime.progress import Progress
from latentforge.runtime.shapes import Range, Sizes, format_shapes
from latentforge.runtime.text import size_text

__all__ = ["STAGE", "CompileTask", "CompilePlan", "compile_engines", "compile_into", "plan"]

STAGE = "compile"
"""Its name in a manifest's history."""

_ROWS = Range(1, 20, 64)  # timesteps that one run is told of; more are done in several
_BATCH = Range(1, 2, 2)  # one image, with guidance or without
_MOST_SHAPES = 32
_BASE = 500e6  # bytes that the libraries themselves take, and the kernels that they write

_ONLY = {"cpu": ("onnxruntime", "onnxruntime-cuda"), "cuda": ("onnxruntime-cuda",)}
"""Targets of optimize whose graphs have operators that only these backends know."""


@dataclass(frozen=True, kw_only=True)
class CompileTask:
    """One engine to build.

    Attributes:
        before: the graph that it is built from.
        component: what it will be, but for its files.
    """

    name: str
    before: Component
    component: Component

    @property
    def memory(self) -> int:
        """Bytes of host memory that the build takes at most: an estimate from measured ones."""
        return int(_BASE + BACKENDS[self.component.backend].memory * self.before.size)

    def __str__(self) -> str:
        made = self.component
        sizes = format_shapes(made.shapes) if made.shapes else "any size"
        if not made.free_dimensions:
            sizes = "one size"
        return (
            f"{self.name}: {made.backend}, {made.precision}, for {sizes}; about "
            f"{size_text(self.before.size)}, and up to {size_text(self.memory)} of memory to build"
        )


@dataclass(frozen=True, kw_only=True)
class CompilePlan:
    """What one compilation will do, with everything checked that can be before work begins.

    Attributes:
        source: the engine directory to read.
        manifest: what it says.
        parts: the engines to build, in order.
        sizes: that were asked for.
        options: of backends, as asked for.
        recorded: what the history is to say of where the graphs came from.
    """

    source: Path
    manifest: Manifest
    parts: tuple[CompileTask, ...]
    sizes: Sizes
    options: Mapping[str, Any]
    recorded: Mapping[str, str]

    @property
    def space(self) -> int:
        """Bytes on the disk that the engines take at most: an estimate."""
        return int(sum(BACKENDS[p.component.backend].space * p.before.size for p in self.parts))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"compile {self.source}, {self.manifest.name}:"
        yield from (f"  {part}" for part in self.parts)
        needed, free = max(part.memory for part in self.parts), available_memory()
        yield f"one engine at a time: up to {size_text(needed)} of memory{_of(free)}"
        if free is not None and needed > free:
            yield "WARNING: that is more than there is: close other programs, or expect to fail"
        yield from self._copies()
        yield f"on the disk about {size_text(self.space)}"
        yield from self._device()

    def _copies(self) -> Iterator[str]:
        """OpenVINO compiles a graph for each of its sizes, with weights of its own."""
        parts = [p for p in self.parts if p.component.backend == "openvino"]
        loaded = sum(p.before.size * max(1, len(p.component.shapes)) for p in parts)
        if loaded > sum(p.before.size for p in parts):
            yield f"loaded, weights are there once for each size: about {size_text(loaded)}"

    def _device(self) -> Iterator[str]:
        gpu = [part for part in self.parts if BACKENDS[part.component.backend].gpu]
        if not gpu:
            return
        _cuda = import_module("latentforge.runtime.backends.cuda")  # which is of no use elsewhere
        weights, free = sum(part.before.size for part in gpu), _cuda.free_memory()
        there = _of(free) if free is not None else "; there is none here to compare with"
        yield f"on the GPU: {size_text(weights)} of weights and what the largest size needs{there}"
        if free is not None and weights > free:
            yield "WARNING: that is more than the GPU has left: they will not load there"


def _of(free: int | None) -> str:
    return "" if free is None else f" of {size_text(free)} free"


def plan(
    source: Path,
    *,
    backend: str,
    others: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    sizes: Sizes | None = None,
    recorded: Mapping[str, str] | None = None,
) -> CompilePlan:
    """Check everything that can be before work begins; see compile_engines() for the rest.

    Args:
        recorded: what the history is to say of where the graphs came from, such as the source.
    """
    manifest, sizes = Manifest.read(source), sizes or Sizes()
    chosen = {name: (others or {}).get(name, backend) for name in manifest.components}
    if unknown := (others or {}).keys() - chosen.keys():
        known = ", ".join(chosen)
        raise SettingsError(f"no component {min(unknown)!r} in {source}; there are {known}")
    _check_source(source, manifest, chosen.values())
    _check_sizes(manifest, sizes)
    given = _options(options, set(chosen.values()))
    return CompilePlan(
        source=source,
        manifest=manifest,
        parts=tuple(_part(name, manifest, chosen[name], given, sizes) for name in chosen),
        sizes=sizes,
        options=given,
        recorded=recorded or {},
    )


def _check_source(source: Path, manifest: Manifest, chosen: Iterable[str]) -> None:
    if any(stage.name == STAGE for stage in manifest.history):
        raise ManifestError(
            f"{source} was compiled already: start from what export or optimize wrote"
        )
    targets = [s.options["target"] for s in manifest.history if "target" in s.options]
    for backend in chosen:
        backends.get(backend)  # which says what to install
        able = _ONLY.get(targets[-1], ()) if targets else ()
        if able and backend not in (*able, "null"):
            raise SettingsError(
                f"{source} was optimized for {targets[-1]}, with operators that {backend} lacks: "
                f"optimize the exported engines with --target {_target(backend)}"
            )


def _target(backend: str) -> str:
    """The target of optimize whose graphs a backend runs best."""
    return backend.replace("onnxruntime-", "") if backend != "onnxruntime" else "cpu"


def _check_sizes(manifest: Manifest, sizes: Sizes) -> None:
    """Refuse sizes that the model cannot have, or that its graphs are not free for."""
    unit = manifest.latent.downscale * manifest.latent.multiple
    for name, ranges in (("height", sizes.height), ("width", sizes.width)):
        for size in (s for each in ranges for s in (each.min, each.opt, each.max)):
            if size % unit:
                raise ShapeError(f"{name} is a multiple of {unit} for this model, not {size}")
    if "denoiser" not in manifest.components:
        return
    rows, _, height, width = manifest.components["denoiser"].inputs["sample"].shape
    scale = manifest.latent.downscale
    _check_fixed("batch", rows, sizes.batch)
    _check_fixed("height", height, sizes.height, scale)
    _check_fixed("width", width, sizes.width, scale)


def _check_fixed(name: str, size: int | str, asked: tuple[Range, ...], scale: int = 1) -> None:
    if isinstance(size, int) and asked and asked != (Range.of(size * scale),):
        raise ShapeError(
            f"{name} {','.join(map(str, asked))} contradicts the graphs, which are fixed to "
            f"{size * scale}: export them again without --{name}"
        )


def _options(texts: Sequence[str], chosen: set[str]) -> dict[str, Any]:
    """Options of all backends that are chosen, together."""
    known: dict[str, type] = {}
    for backend in sorted(chosen):
        known |= backends.get(backend).OPTIONS
    options = backends.parse_options(texts, known)
    if refused := [name for name in ONLY_AT_LOAD if name in options]:
        raise SettingsError(
            f"{refused[0]} is for the one who runs the engines, and not kept in them"
        )
    return options


def _part(
    name: str, manifest: Manifest, backend: str, options: Mapping[str, Any], sizes: Sizes
) -> CompileTask:
    before = manifest.components[name]
    wanted = _sizes_of(name, BACKENDS[backend].any_size, manifest, sizes)
    rows = None if BACKENDS[backend].any_size else _ROWS
    shapes = wanted.shapes(before.free_dimensions, manifest.latent.downscale, rows)
    if len(shapes) > _MOST_SHAPES:
        raise SettingsError(f"{len(shapes)} sizes are too many: give at most {_MOST_SHAPES}")
    known = backends.get(backend).OPTIONS
    component = msgspec.structs.replace(
        before.specialize(shapes),
        backend=backend,
        options={key: value for key, value in options.items() if key in known},
    )
    if not BACKENDS[backend].any_size:
        _check_ranges(name, component)
    return CompileTask(name=name, before=before, component=component)


def _sizes_of(name: str, free: bool, manifest: Manifest, sizes: Sizes) -> Sizes:
    """The sizes for one component: only the UNet sees many rows, the others one after the other."""
    if not free:
        usual = manifest.defaults
        sizes = sizes.with_defaults(
            Sizes(
                height=(Range.of(usual.height),),
                width=(Range.of(usual.width),),
                batch=(_BATCH,),
            )
        )
    alone = not name.startswith("denoiser") and sizes.batch
    return replace(sizes, batch=(Range.of(1),)) if alone else sizes


def _check_ranges(name: str, component: Component) -> None:
    known = {dimension for shapes in component.shapes for dimension in shapes}
    if unknown := [dimension for dimension in component.free_dimensions if dimension not in known]:
        raise ShapeError(
            f"{name}: nothing says how large its {unknown[0]} is, which {component.backend} has to "
            "know: export with fixed sizes"
        )


def compile_engines(
    source: Path,
    target: Path,
    *,
    backend: str,
    others: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    sizes: Sizes | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> Manifest:
    """Compile the graphs of a directory into another one, and compare a picture of both.

    Args:
        source: what export or optimize wrote.
        target: the engine directory to write, whole or not at all.
        backend: a name of BACKENDS.
        others: components that another backend is to run, by name.
        options: of the backends, each KEY=VALUE; each takes those that it knows.
        sizes: to build for; backends that have to know take the manifest's size and one image
            with guidance where nothing is said, and others stay free.
        overwrite: replace an engine directory that is there already.
        quiet: show no progress.

    Raises:
        ManifestError: the source is damaged, or compiled already.
        SettingsError: no such option or component, or graphs that the backend cannot run.
        ShapeError: a size that the model or its graphs cannot have.
        BackendError: a backend is not installed, or refuses a graph.
        GateError: the engines make another picture; they are kept as target.rejected.
        TargetError: the directory cannot be written.
    """
    check_target(target, overwrite=overwrite)
    if source.resolve() == target.resolve():
        raise TargetError(f"{target} is the directory to read: name another")
    todo = plan(
        source,
        backend=backend,
        others=others,
        options=options,
        sizes=sizes,
        recorded={"source": str(source)},
    )
    with staged_directory(target, overwrite=overwrite) as directory:
        _keep_timings(target, directory)
        return compile_into(todo, directory, quiet=quiet)


def _keep_timings(old: Path, directory: Path) -> None:
    """Take along what TensorRT measured of kernels on this GPU: building again is quicker then."""
    for cache in old.glob(f"engines/*/timing{CACHE}"):
        place = directory / cache.relative_to(old)
        place.parent.mkdir(parents=True)
        shutil.copyfile(cache, place)


def compile_into(todo: CompilePlan, directory: Path, *, quiet: bool = True) -> Manifest:
    """Do what plan() planned, in a directory that is staged: see compile_engines()."""
    start = time.perf_counter()
    if not quiet:
        print(todo, file=sys.stderr, flush=True)
    check_space(directory, todo.space)
    components, measured = {}, {}
    with Progress(len(todo.parts) + 1, quiet=quiet) as progress:
        for part in todo.parts:
            with progress.part(f"{part.name}: {part.component.backend}"):
                components[part.name], built = _built(part, todo.source, directory, progress)
            measured[part.name] = _figures(part, components[part.name], built)
        tokenizers = (entry.file for entry in todo.manifest.tokenizers.values())
        copy_files(tokenizers, todo.source, directory)
        manifest = msgspec.structs.replace(todo.manifest, components=components)
        manifest.write(directory)
        with progress.part("comparing a picture of one step"):
            quality = _compared(todo, directory, progress)
    stage = _stage(todo, {**measured, **quality}, start)
    manifest = msgspec.structs.replace(
        manifest, history=(*manifest.history, stage), quality=quality
    )
    manifest.write(directory)
    return manifest


def _built(
    part: CompileTask, source: Path, directory: Path, progress: Progress
) -> tuple[Component, BuiltEngine]:
    """Build one engine under engines/BACKEND, and describe the files that came of it."""
    component = part.component
    folder = directory / "engines" / component.backend
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*"))
    path = folder / f"{part.name}{backends.get(component.backend).SUFFIX}"
    order = BuildOrder(
        onnx=str(source / part.before.file),
        target=str(path),
        component=msgspec.structs.replace(component, file=part.before.file),
    )
    built = build(order, progress.within)
    made = sorted(p for p in set(folder.rglob("*")) - before - {path} if _is_kept(p))
    if not path.is_file():
        raise BackendError(f"{component.backend} made no engine of {part.name}")
    main = FileEntry.of(path, directory)
    return (
        msgspec.structs.replace(
            component,
            file=main.file,
            sha256=main.sha256,
            bytes=main.bytes,
            data=tuple(FileEntry.of(file, directory) for file in made),
            device=built.device,
        ),
        built,
    )


def _is_kept(path: Path) -> bool:
    """Whether a file belongs to an engine: caches are the backend's own, and change."""
    return path.is_file() and path.suffix != CACHE and path.parent.suffix != CACHE


def _figures(part: CompileTask, component: Component, built: BuiltEngine) -> dict[str, float]:
    return {
        "bytes_before": float(part.before.size),
        "bytes_after": float(component.size),
        "build_seconds": built.seconds,
        "build_memory": float(built.peak_memory),
    }


def _compared(
    todo: CompilePlan, directory: Path, progress: Progress
) -> dict[str, Mapping[str, float]]:
    """A picture of one step by both, where both can run here."""
    try:
        return {"image": compare(todo.source, directory)}
    except DeviceError as error:
        progress.note(f"built, and not run here: {error}")
    except ManifestError:
        progress.note("some components alone make no picture: built, and not run")
    return {}


def _stage(todo: CompilePlan, measured: Mapping[str, Mapping[str, float]], start: float) -> Stage:
    used = {part.component.backend for part in todo.parts}
    chosen = {part.name: part.component.backend for part in todo.parts}
    asked = {"options": dict(todo.options), **todo.sizes.asdict()}
    return stage_record(
        STAGE,
        start,
        {**todo.recorded, "backends": chosen, **asked},
        tools={name: backends.version(name) for name in sorted(used - {"null"})},
        measured=measured,
    )
