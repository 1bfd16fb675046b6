"""Plans of the compile stage: which engines are built, for which sizes, and what that takes.

A plan makes every check that is possible before work begins, so that a bad request costs nothing.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from latentforge.runtime import backends
from latentforge.runtime.annotations import check_fields, checked_arguments
from latentforge.runtime.backends import BACKENDS, ONLY_AT_LOAD
from latentforge.runtime.errors import ManifestError, SettingsError, ShapeError
from latentforge.runtime.image import SAME_IMAGE_PSNR
from latentforge.runtime.machine import available_memory
from latentforge.runtime.manifest import Component, Latent, Manifest, RequestDefaults
from latentforge.runtime.shapes import Range, Sizes, format_shapes
from latentforge.runtime.text import size_text

__all__ = [
    "STAGE",
    "CompilePlan",
    "CompileRequest",
    "CompileTask",
    "check_sizes",
    "parse_options",
    "plan_compilation",
]

STAGE = "compile"
"""Name of the stage in a manifest's history."""

_TIME_ROWS = Range(1, 20, 64)  # timesteps per run of denoiser_time; more take several runs
_MAX_SHAPES = 32
_PRECISIONS = {"f16": "fp16", "bf16": "bf16"}  # by the option that asks OpenVINO for them
_BASE_MEMORY = 500e6  # bytes of the libraries themselves, and of the kernels that they generate

_CUSTOM_OPERATORS = {"cpu": ("onnxruntime", "onnxruntime-cuda"), "cuda": ("onnxruntime-cuda",)}
"""Targets of optimize whose graphs have operators that only these backends support."""


@dataclass(frozen=True, kw_only=True)
class CompileRequest:
    """Options of a compilation.

    Attributes:
        backend: name in BACKENDS, for all components that component_backends does not name.
        component_backends: backend by component name.
        options: of the backends, each as KEY=VALUE; every backend takes those that it knows.
        sizes: to build for. If unset, backends that need ranges get the manifest's default size
            and one image with guidance; others stay free.
        overwrite: replace an existing engine directory.
        quiet: show no progress.
    """

    backend: str
    component_backends: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)
    overwrite: bool = False
    quiet: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class CompileTask:
    """One engine to build, for the component of this name."""

    name: str
    source: Component  # the graph that is compiled
    component: Component  # description of the engine, except its files

    @property
    def memory(self) -> int:
        """Peak host memory of the build in bytes: an estimate from measured builds."""
        return int(_BASE_MEMORY + BACKENDS[self.component.backend].memory * self.source.size)

    def __str__(self) -> str:
        engine = self.component
        sizes = format_shapes(engine.shapes) if engine.shapes else "any size"
        if not engine.free_dimensions:
            sizes = "one size"
        return (
            f"{self.name}: {engine.backend}, {engine.precision}, for {sizes}; about "
            f"{size_text(self.source.size)}, and up to {size_text(self.memory)} of memory to build"
        )


@dataclass(frozen=True, kw_only=True)
class CompilePlan:
    """Checked plan of one compilation: the engines to build from a directory, in order."""

    source: Path
    manifest: Manifest  # of the source
    tasks: tuple[CompileTask, ...]
    request: CompileRequest
    options: Mapping[str, Any]  # of the request, parsed
    origin: Mapping[str, str]  # history entries about where graphs came from, such as ``source``

    @property
    def space(self) -> int:
        """Disk space of the engines in bytes: an upper estimate."""
        return int(sum(BACKENDS[t.component.backend].space * t.source.size for t in self.tasks))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"compile {self.source}, {self.manifest.name}:"
        yield from (f"  {task}" for task in self.tasks)
        needed, free = max(task.memory for task in self.tasks), available_memory()
        yield f"one engine at a time: up to {size_text(needed)} of memory{_of_free(free)}"
        if free is not None and needed > free:
            yield "WARNING: less memory is free: close other programs, or expect builds to fail"
        yield from self._copies()
        yield f"on the disk about {size_text(self.space)}"
        yield from self._gpu_memory()

    def _copies(self) -> Iterator[str]:
        """Yield a line about OpenVINO, which holds the weights once for each size."""
        tasks = [task for task in self.tasks if task.component.backend == "openvino"]
        loaded = sum(task.source.size * max(1, len(task.component.shapes)) for task in tasks)
        if loaded > sum(task.source.size for task in tasks):
            yield f"loaded engines hold the weights once for each size: about {size_text(loaded)}"

    def _gpu_memory(self) -> Iterator[str]:
        tasks = [task for task in self.tasks if BACKENDS[task.component.backend].gpu]
        if not tasks:
            return
        cuda = import_module("latentforge.runtime.backends.cuda")  # other backends don't need it
        weights, free = sum(task.source.size for task in tasks), cuda.free_memory()
        available = _of_free(free) if free is not None else "; this machine has no GPU"
        yield f"on the GPU: {size_text(weights)} of weights plus activations{available}"
        if free is not None and weights > free:
            yield "WARNING: less GPU memory is free: the engines will not load here"


def _of_free(free: int | None) -> str:
    return "" if free is None else f" of {size_text(free)} free"


@checked_arguments
def plan_compilation(
    source: Path, request: CompileRequest, *, origin: Mapping[str, str] | None = None
) -> CompilePlan:
    """Return a plan after all checks that are possible before work begins.

    Args:
        source: engine directory that export or optimize wrote.
        request: backends, options and sizes.
        origin: history entries about where the graphs came from, such as ``source``.

    Raises:
        ManifestError: the source is damaged, or compiled already.
        SettingsError: there is no such option or component, or the backend lacks operators.
        ShapeError: the model or its graphs cannot have one of the sizes.
        BackendError: a backend does not exist or is not installed.
    """
    manifest = Manifest.read(source)
    selected = _selected_backends(source, manifest, request)
    _check_source(source, manifest, selected.values())
    check_sizes(manifest.latent, request.sizes)
    _check_fixed_sizes(manifest, request.sizes)
    options = parse_options(request.options, selected.values())
    tasks = [_task(name, manifest, own, options, request.sizes) for name, own in selected.items()]
    return CompilePlan(
        source=source,
        manifest=manifest,
        tasks=tuple(tasks),
        request=request,
        options=options,
        origin=origin or {},
    )


def _selected_backends(source: Path, manifest: Manifest, request: CompileRequest) -> dict[str, str]:
    """Return the backend of each component."""
    if unknown := request.component_backends.keys() - manifest.components.keys():
        names = ", ".join(manifest.components)
        raise SettingsError(f"no component {min(unknown)!r} in {source}; there are {names}")
    backend = request.backend
    return {name: request.component_backends.get(name, backend) for name in manifest.components}


def _check_source(source: Path, manifest: Manifest, selected: Iterable[str]) -> None:
    if any(stage.name == STAGE for stage in manifest.history):
        raise ManifestError(
            f"{source} was compiled already: start from the output of export or optimize"
        )
    targets = [s.options["target"] for s in manifest.history if "target" in s.options]
    for backend in selected:
        backends.get(backend)  # raises with what to install
        supported = _CUSTOM_OPERATORS.get(targets[-1], ()) if targets else ()
        if supported and backend not in (*supported, "null"):
            target = "cpu" if backend == "onnxruntime" else backend.removeprefix("onnxruntime-")
            raise SettingsError(
                f"{source} was optimized for {targets[-1]}, with operators that {backend} lacks: "
                f"optimize the exported engines with --target {target}"
            )


def check_sizes(latent: Latent, sizes: Sizes) -> None:
    """Check that a model can have these sizes.

    Raises:
        ShapeError: a side is no multiple of what one latent stands for.
        SettingsError: there are more combinations than anyone builds.
    """
    unit = latent.downscale * latent.multiple
    for name, ranges in (("height", sizes.height), ("width", sizes.width)):
        for size in (s for each in ranges for s in (each.min, each.opt, each.max)):
            if size % unit:
                raise ShapeError(f"{name} must be a multiple of {unit} for this model, not {size}")
    count = math.prod(len(ranges) or 1 for ranges in (sizes.height, sizes.width, sizes.batch))
    if count > _MAX_SHAPES:
        raise SettingsError(f"{count} sizes are too many: give at most {_MAX_SHAPES}")


def _check_fixed_sizes(manifest: Manifest, sizes: Sizes) -> None:
    """Refuse sizes that contradict fixed sizes of the graphs."""
    if "denoiser" not in manifest.components:
        return
    rows, _, height, width = manifest.components["denoiser"].inputs["sample"].shape
    scale = manifest.latent.downscale
    _check_fixed("batch", rows, sizes.batch)
    _check_fixed("height", height, sizes.height, scale)
    _check_fixed("width", width, sizes.width, scale)


def _check_fixed(name: str, size: int | str, ranges: tuple[Range, ...], scale: int = 1) -> None:
    if isinstance(size, int) and ranges and ranges != (Range.of(size * scale),):
        raise ShapeError(
            f"{name} {','.join(map(str, ranges))} contradicts the graphs, which are fixed to "
            f"{size * scale}: export them again without --{name}"
        )


def parse_options(texts: Sequence[str], selected: Iterable[str]) -> dict[str, Any]:
    """Parse options, each of which at least one of the backends has.

    Raises:
        SettingsError: none has it, it has another type, or it is for loading alone.
        BackendError: a backend does not exist or is not installed.
    """
    types: dict[str, type] = {}
    for backend in sorted(set(selected)):
        types |= backends.get(backend).OPTIONS
    options = backends.parse_options(texts, types)
    if refused := [name for name in ONLY_AT_LOAD if name in options]:
        raise SettingsError(
            f"option {refused[0]} is set when engines are loaded, and is not stored in them"
        )
    return options


def _task(
    name: str, manifest: Manifest, backend: str, options: Mapping[str, Any], sizes: Sizes
) -> CompileTask:
    source = manifest.components[name]
    any_size = BACKENDS[backend].any_size
    component_sizes = _component_sizes(name, any_size, manifest, sizes)
    rows = None if any_size else _TIME_ROWS
    shapes = component_sizes.shapes(source.free_dimensions, manifest.latent.downscale, rows)
    types = backends.get(backend).OPTIONS
    own = {key: value for key, value in options.items() if key in types}
    component = msgspec.structs.replace(
        source.specialize(shapes),
        backend=backend,
        options=own,
        precision=_computed_precision(source, own),
    )
    if not any_size:
        backends.check_ranges(component)
    return CompileTask(name=name, source=source, component=component)


def _computed_precision(source: Component, options: Mapping[str, Any]) -> str:
    """Return what an engine computes in: that of an option, unless the graph is quantized."""
    asked = _PRECISIONS.get(options.get("precision", ""))
    return asked if asked and source.precision in SAME_IMAGE_PSNR else source.precision


def _component_sizes(name: str, any_size: bool, manifest: Manifest, sizes: Sizes) -> Sizes:
    """Return the sizes for a component; all but the denoiser run on one row at a time."""
    if not any_size:
        defaults = manifest.defaults
        height, width = Range.of(defaults.height), Range.of(defaults.width)
        sizes = sizes.with_defaults(
            Sizes(height=(height,), width=(width,), batch=(_denoiser_rows(defaults),))
        )
    one_row = not name.startswith("denoiser") and sizes.batch
    return replace(sizes, batch=(Range.of(1),)) if one_row else sizes


def _denoiser_rows(defaults: RequestDefaults) -> Range:
    """Return the rows of one image, with or without classifier-free guidance."""
    rows = 2 if defaults.image_guidance_scale == 1 else 3
    return Range(1, rows, rows)
