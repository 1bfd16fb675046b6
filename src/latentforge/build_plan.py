"""Plans of builds: time, memory and disk of each stage, before the work begins.

Memory and times were measured on full-size Stable Diffusion 1.5 and smaller models; times follow
the speed of this machine at multiplying matrices. They are first estimates: once the engines are
exported, one measured step replaces them (optimize/stage/durations.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import msgspec
import numpy as np

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.families import Family
from latentforge.export.optimum import is_exported
from latentforge.measure.hardware import fit_together
from latentforge.optimize.recipe import Recipe
from latentforge.optimize.stage.durations import (
    ImageCost,
    RunSize,
    Workload,
    durations,
    expected_speedup,
)
from latentforge.optimize.stage.job import recipes_of
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.stage.sizing import FLOOR
from latentforge.optimize.targets import TARGETS
from latentforge.runtime import backends
from latentforge.runtime.errors import BackendError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.text import duration_text, size_text

__all__ = ["BuildPlan", "CheckpointSize", "PlannedStage", "StageEstimates"]

_REFERENCE_SPEED = 200e9  # FLOP/s of the machine on which the seconds below were measured
_SIDE = 1024  # of the matrices that are multiplied to measure this machine
_MEASURED_SECONDS = 0.15
_EFFICIENCY = 0.75  # of convolutions, against a product of matrices
_EXPORT_SECONDS = 12.0
_GRAPH_SECONDS = 33.0  # of tracing full graphs
_GRAPH_BYTES = 150e6  # of weights, from which graphs count as full
_EXPORT_RATE = 15e-9  # seconds per byte
_COMPILE_SECONDS = 5.0
_COMPILE_RATE = 12e-9
_LOAD_SECONDS = 0.3
_LOAD_RATE = 2.5e-9
_ENCODER_WORK = 300.0  # FLOP per parameter and row: two for each of the tokens
_DENOISER_WORK = 0.19  # FLOP per parameter, row and position of the latents
_VAE_WORK = 6.0
_EXPORT_MEMORY = 1.5  # as a multiple of the weights in fp32: 6.4 to 7.4 GB of 4.3 GB
_ATTENTION_MEMORY = (
    2.9  # as a multiple of the attention scores of the exported graph: 8.1 GB at 512
)
_COMPARED_MEMORY = 2  # as a multiple of the weights: OpenVINO maps the file beside its own layout
_HEADS = 8
_MAX_ATTENDED = 64 * 64  # positions: larger latents are attended to at a coarser level
_BASE_MEMORY = 500_000_000  # libraries, and activations of a small image
_JUDGED_MEMORY = 1_600_000_000  # the same of a process that has exported, and of two that time
_SELECT_STEPS = 4
_ROWS_STEPS = 2  # steps of a pair, with all rows and with single ones


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """Stage of a build.

    Attributes:
        name: of the stage.
        text: work in words.
        seconds: estimated; None if it depends on what is found.
        memory: bytes at its peak.
        disk: bytes that it writes.
    """

    name: str
    text: str
    seconds: float | None
    memory: int
    disk: int = 0

    def __str__(self) -> str:
        time = "" if self.seconds is None else f"about {duration_text(self.seconds)}, "
        disk = f", {size_text(self.disk)} on disk" if self.disk else ""
        return f"{self.text}: {time}up to {size_text(self.memory)} of memory{disk}"


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Stages of a build and the resources that they take, estimated from a checkpoint's headers.

    Attributes:
        title: the checkpoint and its family.
        weights: bytes in fp32 by component.
        stages: in order.
        budget: seconds to keep to; None for no limit.
        free_memory: bytes available now; None if unknown.
        total_memory: bytes of the machine; None if unknown.
        warnings: problems that do not prevent the build.
    """

    title: str
    weights: Mapping[str, int]
    stages: tuple[PlannedStage, ...]
    budget: float | None
    free_memory: int | None
    total_memory: int | None
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Estimated seconds of all stages that can be estimated."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def memory(self) -> int:
        """Bytes at the peak of the largest stage."""
        return max(stage.memory for stage in self.stages)

    @property
    def disk(self) -> int:
        """Bytes on disk of all stages."""
        return sum(stage.disk for stage in self.stages)

    def check(self) -> None:
        """Check that this machine has enough memory.

        Raises:
            BackendError: a stage takes more than the machine has in total.
        """
        largest = max(self.stages, key=lambda stage: stage.memory)
        if self.total_memory is not None and largest.memory > self.total_memory:
            raise BackendError(
                f"the stage {largest.name} of {self.title} takes up to {size_text(largest.memory)} "
                f"of memory, and this machine has {size_text(self.total_memory)}: build on a "
                "larger machine and copy the engines"
            )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"build {self.title}:"
        for name, size in self.weights.items():
            yield f"  {name}: {size_text(size)} of weights in fp32"
        yield from (f"{number}. {stage}" for number, stage in enumerate(self.stages, 1))
        limit = "" if self.budget is None else f", for a budget of {duration_text(self.budget)}"
        yield f"time: about {duration_text(self.seconds)}{limit}; measured anew after the export"
        free = "" if self.free_memory is None else f" of {size_text(self.free_memory)} free"
        yield f"memory: up to {size_text(self.memory)}{free}"
        yield f"disk: up to {size_text(self.disk)}"
        yield from (f"WARNING: {warning}" for warning in self.warnings)


@dataclass(frozen=True, kw_only=True)
class CheckpointSize:
    """Figures of a checkpoint that time and memory depend on.

    Attributes:
        weights: bytes in fp32 by folder.
        rows: of a denoiser step.
        positions: of the latents.
        steps: of an image by default.
    """

    weights: Mapping[str, int]
    rows: int
    positions: int
    steps: int

    @classmethod
    def of(cls, source: Checkpoint, family: Family) -> CheckpointSize:
        """Return the figures of a checkpoint from its headers."""
        plan = family.plan(source)
        height, width = plan.sample_size
        return cls(
            weights=_weights(source, family),
            rows=1 if plan.defaults.guidance_scale <= 1 else 2,
            positions=height * width // plan.latent.downscale**2,
            steps=plan.defaults.steps,
        )

    @classmethod
    def of_engines(cls, manifest: Manifest) -> CheckpointSize:
        """Return the figures of exported engines."""
        defaults, latent = manifest.defaults, manifest.latent
        return cls(
            weights={name: component.size for name, component in manifest.components.items()},
            rows=1 if defaults.guidance_scale <= 1 else 2,
            positions=defaults.height * defaults.width // latent.downscale**2,
            steps=defaults.steps,
        )

    @property
    def bytes(self) -> int:
        """Bytes of all weights in fp32."""
        return sum(self.weights.values())

    @property
    def denoiser(self) -> int:
        """Bytes of the denoiser's weights, which are the largest."""
        return max(self.weights.values())

    @property
    def engines_memory(self) -> int:
        """Bytes of a process that runs the exported engines, beside its libraries."""
        attended = min(self.positions, _MAX_ATTENDED)
        scores = 4 * self.rows * _HEADS * attended**2
        return self.bytes + int(_ATTENTION_MEMORY * scores)

    def judged_memory(self, timed: int = 1) -> int:
        """Return the bytes at the peak of gate and timing.

        Args:
            timed: engine directories that are timed, and loaded together if they fit.
        """
        together = fit_together([self.bytes] * timed)
        return (timed if together else 1) * self.engines_memory + _JUDGED_MEMORY

    def image_cost(self, speed: float) -> ImageCost:
        """Return a first estimate of an image's parts, at a speed in FLOP/s."""
        vae = sum(size for name, size in self.weights.items() if name.startswith("vae"))
        encoders = self.bytes - self.denoiser - vae if vae else 0
        rate = 4 * _EFFICIENCY * speed  # in bytes of weights
        return ImageCost(
            load=_LOAD_SECONDS + _LOAD_RATE * self.bytes,
            encode=_ENCODER_WORK * self.rows * encoders / rate,
            step=_DENOISER_WORK * self.rows * self.positions * self.denoiser / rate,
            decode=_VAE_WORK * self.positions * vae / rate,
        )


def _weights(source: Checkpoint, family: Family) -> dict[str, int]:
    """Return bytes in fp32 of each component's weights, or of the graphs that optimum exported."""
    if is_exported(source):
        return {"graphs": sum(path.stat().st_size for path in source.path.glob("*/*.onnx*"))}
    folders = sorted({part.folder for part in family.plan(source).components})
    return {folder: 4 * source.parameters(folder) for folder in folders}


@dataclass(frozen=True, kw_only=True)
class StageEstimates:
    """Estimates of the stages of a build.

    Attributes:
        size: of the checkpoint.
        request: of the optimizations, for any of the targets.
        targets: to build for.
        compiled: those of them that are compiled.
    """

    size: CheckpointSize
    request: OptimizeRequest
    targets: tuple[str, ...]
    compiled: tuple[str, ...]

    @cached_property
    def speed(self) -> float:
        """Speed of this machine in FLOP/s, measured in a fifth of a second."""
        matrix = np.ones((_SIDE, _SIDE), np.float32)
        matrix @ matrix
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < _MEASURED_SECONDS:
            matrix @ matrix
            count += 1
        return 2.0 * _SIDE**3 * count / seconds

    @cached_property
    def cost(self) -> ImageCost:
        """Cost of an image, estimated."""
        return self.size.image_cost(self.speed)

    def export(self) -> PlannedStage:
        """Return the stage of the export, with its comparisons."""
        size = self.size.bytes
        graphs = _GRAPH_SECONDS * min(1.0, size / _GRAPH_BYTES)
        seconds = (_EXPORT_SECONDS + graphs + _EXPORT_RATE * size) * self._slowness
        return PlannedStage(
            name="export",
            text="export, and compare with torch and diffusers",
            seconds=seconds,
            memory=int(_EXPORT_MEMORY * size) + _BASE_MEMORY,
            disk=size,
        )

    def optimize(self, target: str) -> PlannedStage:
        """Return the stage of the optimization for a target, within its share of the budget."""
        work = self._workload(target)
        seconds, recipes = sum(durations(work, self.cost).values()), len(work.recipes)
        if self.request.budget is not None:
            others = self.export().seconds or 0.0
            share = (self.request.budget - others - self.after(self.cost)) / len(self.targets)
            floor = sum(durations(_floor(work), self.cost).values())
            seconds = max(min(seconds, share), floor)
        return PlannedStage(
            name="optimize",
            text=f"optimize by recipe {self.request.recipe}, for {target}, behind a quality gate "
            "on images",
            seconds=seconds,
            memory=self.size.judged_memory(recipes + 1 if work.size.repeats else 1),
            disk=self.size.bytes * recipes,
        )

    def compile(self, target: str, sizes: str) -> PlannedStage:
        """Return the stage of the compilation for a target and sizes, in words."""
        spec = backends.BACKENDS[TARGETS[target].backend]
        size = sizes or ("any size" if spec.any_size else "the model's default size")
        return PlannedStage(
            name="compile",
            text=f"compile with {TARGETS[target].backend} for {size}",
            seconds=self._compile_seconds,
            memory=self._compile_memory(spec),
            disk=self.size.bytes,
        )

    def _compile_memory(self, spec: backends.BackendSpec) -> int:
        """Return the bytes of the compiler, or of the comparison afterwards if that takes more."""
        compiler = int(spec.memory * self.size.denoiser) + _BASE_MEMORY
        compared = 0 if spec.gpu else _COMPARED_MEMORY * self.size.bytes + _JUDGED_MEMORY
        return max(compiler, compared)

    def choose(self) -> Iterator[PlannedStage]:
        """Yield the stages that time the result, to choose backends and rows."""
        if len(self.targets) > 1:
            yield PlannedStage(
                name="select",
                text="time the targets with interleaved runs, and take the fastest of each "
                "component",
                seconds=self._select_seconds(self.cost),
                memory=self.size.judged_memory(len(self.targets)),
            )
        if seconds := self._rows_seconds(self.cost):
            yield PlannedStage(
                name="rows",
                text="time guidance in runs of one row and of all rows",
                seconds=seconds,
                memory=self.size.judged_memory(),
            )

    def after(self, cost: ImageCost) -> float:
        """Return the seconds of everything after the optimizations."""
        compiled = len(self.compiled) * self._compile_seconds
        select = self._select_seconds(cost) if len(self.targets) > 1 else 0.0
        return compiled + select + self._rows_seconds(cost)

    @property
    def _slowness(self) -> float:
        """Time that this machine takes, relative to that of the reference."""
        return _REFERENCE_SPEED / self.speed

    @property
    def _compile_seconds(self) -> float:
        return (_COMPILE_SECONDS + _COMPILE_RATE * self.size.bytes) * self._slowness

    def _select_seconds(self, cost: ImageCost) -> float:
        runs = (self.request.pairs or 1) + 1
        return len(self.targets) * (cost.load + runs * cost.image(_SELECT_STEPS))

    def _rows_seconds(self, cost: ImageCost) -> float:
        if not (self.request.pairs and self.size.rows > 1):
            return 0.0
        pair = _ROWS_STEPS * (cost.encode + cost.step)
        return cost.load + (self.request.pairs + 1) * pair

    def _workload(self, target: str) -> Workload:
        recipes = list(recipes_of(replace(self.request, target=target)).values())
        steps = cast(int, self.request.settings.get("steps") or self.size.steps)
        pairs = self.request.pairs if TARGETS[target].runs_on_cpu else 0
        return Workload(
            recipes=recipes,
            size=RunSize.wanted(recipes, steps, pairs),
            bytes=self.size.bytes,
            speedup=expected_speedup(TARGETS[target]),
        )


def _floor(work: Workload) -> Workload:
    """Return the least that a budget may reduce an optimization to: see sizing.py."""
    floor = {name: min(getattr(work.size, name), value) for name, value in FLOOR.items()}
    recipes = [_smallest(recipe) for recipe in work.recipes]
    return replace(work, recipes=recipes, size=replace(work.size, **floor))


def _smallest(recipe: Recipe) -> Recipe:
    calibration = msgspec.structs.replace(recipe.calibration, samples=FLOOR["samples"])
    return msgspec.structs.replace(recipe, calibration=calibration, sensitivity=None)
