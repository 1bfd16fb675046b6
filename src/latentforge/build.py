"""From a checkpoint to engines in one go: export, optimize, compile, and choose what is fastest.

With ``fast`` a plan of cheaper evaluations is searched for them too.

The stages meet on disk alone; this is the one place that knows all of them.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import Family, family_of
from latentforge.export.onnx import Dimensions
from latentforge.export.optimum import is_exported
from latentforge.export.stage import ExportRequest, export
from latentforge.optimize.recipe import read_recipe
from latentforge.optimize.search.backends import select_backends, tune_rows
from latentforge.optimize.search.search import SearchRequest, accelerate, check
from latentforge.optimize.stage.job import plan as plan_optimization
from latentforge.optimize.stage.stage import optimize_into
from latentforge.optimize.targets import TARGETS
from latentforge.runtime import backends
from latentforge.runtime.compile import stage as compiler
from latentforge.runtime.errors import BackendError, GateError, SettingsError
from latentforge.runtime.files import staged_directory
from latentforge.runtime.kernels import library
from latentforge.runtime.machine import available_memory
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.shapes import Range, Sizes
from latentforge.runtime.text import near_miss, size_text

__all__ = ["AUTO", "build", "dimensions", "optimize_and_compile", "estimate"]

AUTO = "auto"
"""The target that measures what can run on this machine."""

_EXPORT_MEMORY = 2.2  # times the weights in fp32, as measured: 1.3 to 2.2
_CANDIDATES = ("cpu", "openvino")


def build(
    checkpoint: str,
    engines: Path,
    *,
    target: str = "cpu",
    recipe: str = "fp32",
    sizes: Sizes | None = None,
    options: Sequence[str] = (),
    fast: SearchRequest | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    **optimization: Any,
) -> Manifest:
    """Make engines of a checkpoint, ready to run.

    Args:
        checkpoint: a diffusers directory, one that optimum-onnx exported, a hub id, or ``demo``.
        engines: the directory to write, whole or not at all.
        target: a name of TARGETS, or ``auto``: the fastest that can run here, by component.
        recipe: the name of one that comes with the package, or a TOML file.
        sizes: to build for; nothing leaves them free where the backend allows that.
        options: of the backend, each KEY=VALUE.
        fast: what to ask of the search for a plan; None searches none.
        overwrite: replace an engine directory that is there already.
        quiet: show no progress.
        optimization: gate, prompts, calibrate, request and repeats of optimize().

    Raises:
        LatentforgeError: what export, optimize and compile raise.
    """
    wanted = sizes or Sizes()
    _targets(target)
    read_recipe(recipe)  # a typo should not cost an export
    if fast is not None:
        check(fast, checkpoint, target)
    with staged_directory(engines, overwrite=overwrite) as directory:
        exported = directory / "exported"
        try:
            export(checkpoint, exported, ExportRequest(dimensions=dimensions(wanted), quiet=quiet))
            manifest = optimize_and_compile(
                exported,
                directory,
                target=target,
                recipe=recipe,
                sizes=_left(wanted),
                options=options,
                quiet=quiet,
                **optimization,
            )
        finally:
            shutil.rmtree(exported, ignore_errors=True)
        if repeats := optimization.get("repeats", 3):
            manifest = tune_rows(directory, repeats=repeats)
        return manifest if fast is None else accelerate(directory, fast, quiet=quiet)


def optimize_and_compile(
    exported: Path,
    directory: Path,
    *,
    target: str,
    recipe: str = "fp32",
    sizes: Sizes | None = None,
    options: Sequence[str] = (),
    quiet: bool = True,
    **optimization: Any,
) -> Manifest:
    """Optimize and compile exported engines into a directory that is staged: see build().

    Args:
        sizes: those that the graphs are not fixed to.
    """
    targets = _targets(target)
    make = partial(
        _build_target, exported, recipe=recipe, sizes=sizes or Sizes(), options=options, quiet=quiet
    )
    if target != AUTO:
        return make(target, directory, **optimization)
    made, refused = dict[str, Path](), dict[str, str]()
    with _scratch(directory) as work:
        for name in targets:
            (work / name).mkdir()
            try:
                make(name, work / name, **optimization)
                made[name] = work / name
            except (BackendError, GateError) as error:
                refused[name] = str(error)
        if not made:
            raise GateError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
        repeats = optimization.get("repeats", 3) or 1
        return select_backends(made, directory, refused=refused, repeats=repeats, quiet=quiet)


def estimate(
    checkpoint: str,
    *,
    target: str = "cpu",
    recipe: str = "fp32",
    sizes: Sizes | None = None,
    fast: SearchRequest | None = None,
) -> Iterator[str]:
    """What build() would do and about what it takes, line by line, from a checkpoint's headers.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a kind we refuse.
        SettingsError: no such target or recipe, or a plan could not be judged.
    """
    targets = _targets(target)
    read_recipe(recipe)
    if fast is not None:
        check(fast, checkpoint, target)
    source = open_checkpoint(checkpoint)
    family = family_of(source)
    weights = _weights(source, family)
    free = available_memory()
    yield f"build {source.name} ({family.name}):"
    yield from (f"  {name}: {size_text(size)} of weights in fp32" for name, size in weights.items())
    memory = int(_EXPORT_MEMORY * sum(weights.values()))
    yield f"1. export: up to {size_text(memory)} of memory"
    if library() is None and "cpu" in targets:
        yield (
            "without latentforge's own kernels, which were not compiled when it was installed: "
            "with a C++ compiler, python -m latentforge.runtime.kernels does so now"
        )
    yield f"2. optimize by recipe {recipe}, for {', '.join(targets)}; pictures judge the result"
    for name in targets:
        if not TARGETS[name].needs_compile and not (sizes and sizes.asdict()):
            continue
        entry = backends.BACKENDS[TARGETS[name].backend]
        memory = max(memory, int(entry.memory * max(weights.values())))
        made = ", ".join(f"{k} {v}" for k, v in (sizes or Sizes()).asdict().items())
        usual = "any size" if entry.free else "the model's own size"
        yield f"3. compile with {TARGETS[name].backend} for {made or usual}"
    yield f"memory: up to {size_text(memory)}{' of ' + size_text(free) + ' free' if free else ''}"
    yield f"disk: up to {size_text((2 + len(targets)) * sum(weights.values()))}"
    if len(targets) > 1:
        yield "4. time them in turns, and take the fastest of each component"
    if fast is not None:
        yield f"at last: {fast}"
    if free is not None and memory > free:
        yield "WARNING: that is more memory than there is: close other programs, or expect to fail"


def _weights(source: Checkpoint, family: Family) -> dict[str, int]:
    """Bytes in float32 of each component's weights, or of the graphs that optimum exported."""
    if is_exported(source):
        return {"graphs": sum(path.stat().st_size for path in source.path.glob("*/*.onnx*"))}
    folders = sorted({part.folder for part in family.plan(source).components})
    return {folder: 4 * source.parameters(folder) for folder in folders}


def _targets(target: str) -> list[str]:
    """The targets that a name stands for, those that are installed."""
    if target != AUTO:
        if target not in TARGETS:
            raise SettingsError(f"no target {target!r}; {near_miss(target, (*TARGETS, AUTO))}")
        backends.get(TARGETS[target].backend)
        return [target]
    able = []
    for name in _CANDIDATES:
        with suppress(BackendError):
            backends.get(TARGETS[name].backend)
            able.append(name)
    return able


def dimensions(sizes: Sizes) -> Dimensions:
    """What graphs can be fixed to: each size that is the only one."""
    only = {
        name: ranges[0].min
        for name, ranges in (
            ("height", sizes.height),
            ("width", sizes.width),
            ("batch", sizes.batch),
        )
        if len(ranges) == 1 and ranges[0].fixed
    }
    return Dimensions(**only)


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    work = directory / "work"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _build_target(
    exported: Path,
    name: str,
    directory: Path,
    *,
    recipe: str,
    sizes: Sizes,
    options: Sequence[str],
    quiet: bool,
    **optimization: Any,
) -> Manifest:
    """Optimize into a directory, and compile what the target does not run as it is."""
    target = TARGETS[name]
    job = plan_optimization(exported, recipe=recipe, backend=name, **optimization)
    if not target.needs_compile and not options and sizes == Sizes():
        return optimize_into(job, directory, quiet=quiet)
    optimized = directory / "optimized"
    optimized.mkdir()
    try:
        optimize_into(job, optimized, quiet=quiet)
        todo = compiler.plan(
            optimized,
            backend=target.backend,
            options=options,
            sizes=sizes,
            recorded={"target": name},
        )
        manifest = compiler.compile_into(todo, directory, quiet=quiet)
    except GateError:
        _keep(optimized, directory)
        raise
    shutil.rmtree(optimized)
    return manifest


def _left(sizes: Sizes) -> Sizes:
    """The sizes that the graphs are not fixed to."""

    def several(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        return () if len(ranges) == 1 and ranges[0].fixed else ranges

    return Sizes(
        height=several(sizes.height), width=several(sizes.width), batch=several(sizes.batch)
    )


def _keep(optimized: Path, directory: Path) -> None:
    """Leave what was rejected where people look for it."""
    for file in optimized.iterdir():
        if not (directory / file.name).exists():
            file.rename(directory / file.name)
