"""Denoiser engines: the parts that run once per request, once per schedule, and in every step.

docs/format.md describes the inputs and outputs of the parts. An engine directory whose denoiser is
not partitioned has only the last:

    conditioning -> denoiser_prompt -+                once per request
                                     v
    timesteps ----> denoiser_time ---+                once per schedule
                                     v
    latents --------------------> denoiser            every step
                                     | cached_feature
                                     v
    latents -----------------> denoiser_cached        cached steps

A cached step skips the deep blocks and reuses their output of an earlier step: DeepCache, Ma et al.
(2023), arXiv 2312.00858.

The outputs of denoiser_prompt and the cached feature are passed on as they come, so that they stay
on a device whose sessions can keep them. Outputs of denoiser_time are sliced and latents are the
samplers', which are numpy: these, some kilobytes in each step, go through the host.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.acceleration import DenoiserVariant
from latentforge.runtime.engine import Engine
from latentforge.runtime.manifest import CACHED_FEATURE
from latentforge.runtime.tensor import Feeds, Tensor, Tensors, TensorSpec, on_host
from latentforge.runtime.timings import Stopwatch

__all__ = ["ConditionedDenoiser", "StepEngines"]

Array = NDArray[np.float32]
_T = TypeVar("_T", bound=Tensor)


@dataclass(frozen=True, kw_only=True)
class StepEngines:
    """Engines of a denoiser. Threads may share them.

    Attributes:
        step: runs in every full step.
        prompt: runs once per request, with one row per row of the step.
        time: runs once for all timesteps of a schedule, one row per timestep; if it takes outputs
            of the prompt part too, one row per timestep and row of the step.
        cached: runs in cached steps; None if the request has none.
    """

    step: Engine
    prompt: Engine | None = None
    time: Engine | None = None
    cached: Engine | None = None

    @classmethod
    def of(
        cls,
        engines: Mapping[str, Engine],
        variant: DenoiserVariant = "denoiser",
        *,
        cached: bool = False,
    ) -> "StepEngines":
        """Collect the denoiser's engines from the loaded components, by name.

        ``variant`` runs in full steps; ``cached`` is True if the request has cached steps.
        """
        return cls(
            step=engines[variant],
            prompt=engines.get("denoiser_prompt"),
            time=engines.get("denoiser_time"),
            cached=engines["denoiser_cached"] if cached else None,
        )

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """Inputs of the whole denoiser: those of a part that are not outputs of another."""
        parts = [part.component for part in (self.prompt, self.time, self.step) if part is not None]
        internal = {name for part in parts for name in part.outputs}
        specs = (item for part in parts for item in part.inputs.items())
        return {name: spec for name, spec in specs if name not in internal}

    def condition(
        self,
        conditioning: Feeds,
        timesteps: Iterable[float],
        watch: Stopwatch,
        max_rows: int | None = None,
    ) -> "ConditionedDenoiser":
        """Run the parts that do not depend on the latents, and return the denoiser of one request.

        Args:
            conditioning: all inputs except sample and timestep, one row per row of the latents.
            timesteps: the timesteps of the request; others are possible but slower.
            watch: times each run of a part.
            max_rows: largest micro-batch of a step; None: as the engines were loaded.
        """
        outputs: Tensors = {}
        if self.prompt is not None:
            with watch.stage("denoiser_prompt"):
                rows, names = _inputs_of(self.prompt, conditioning), self.prompt.component.outputs
                _, outputs = self.prompt.run_resident(rows, keep=names)
        denoiser = ConditionedDenoiser(self, {**conditioning, **outputs}, watch, max_rows)
        denoiser.prepare(timesteps)
        return denoiser


class ConditionedDenoiser:
    """Denoiser of one request, bound to its conditioning.

    It keeps the outputs of the time part, and the cached feature of the last full step.
    """

    def __init__(
        self, engines: StepEngines, rows: Tensors, watch: Stopwatch, max_rows: int | None
    ) -> None:
        self._engines = engines
        self._rows = rows
        self._count = len(next(iter(rows.values())))
        self._prompts = {self._count: engines.step.prepared(_inputs_of(engines.step, rows))}
        self._watch = watch
        self._max_rows = max_rows
        self._times: dict[float, tuple[Feeds, Feeds]] = {}
        self._feature: Tensor | None = None

    def predict(self, sample: Array, timestep: float, *, cached: bool = False) -> Array:
        """Return the denoiser's output for a sample (rows, channels, h, w), in float32.

        Args:
            sample: one row per row of the conditioning, or fewer: then the last of them.
            timestep: of all rows.
            cached: reuse the cached feature of the last full step. If that step had fewer rows, or
                there was none, the step is full: a correct result comes before speed.
        """
        self.prepare([timestep])
        count = len(sample)
        rows, shared = self._times[timestep]
        timed = {name: _last(array, count) for name, array in rows.items()}
        feeds = {"sample": sample, **self._conditioning(count), **timed}
        feature, engine = self._feature, self._engines.cached
        if cached and engine is not None and feature is not None and count <= len(feature):
            feeds[CACHED_FEATURE] = _last(feature, count)
            return self._run_step("denoiser_cached", engine, feeds, shared, timestep)
        return self._run_step("denoiser", self._engines.step, feeds, shared, timestep)

    def prepare(self, timesteps: Iterable[float]) -> None:
        """Run the time part for those of the timesteps that are new."""
        new = [timestep for timestep in dict.fromkeys(timesteps) if timestep not in self._times]
        time = self._engines.time
        if time is None:
            self._times |= dict.fromkeys(new, ({}, {}))
        elif new:
            with self._watch.stage("denoiser_time"):
                self._times |= self._run_time(time, new)

    def _run_step(
        self, stage: str, engine: Engine, rows: Tensors, shared: Feeds, timestep: float
    ) -> Array:
        constant = {**_inputs_of(engine, shared), **_timestep_input(engine, timestep)}
        inputs, limit = _inputs_of(engine, rows), self._max_rows
        with self._watch.stage(stage):
            outputs, kept = engine.run_resident(
                inputs, constant, keep=(CACHED_FEATURE,), max_rows=limit
            )
        if self._engines.cached and CACHED_FEATURE in kept:
            self._feature = kept[CACHED_FEATURE]
        return outputs["out_sample"]

    def _conditioning(self, count: int) -> Tensors:
        """Return the conditioning of the last `count` rows.

        Slices are kept: a backend skips the upload if it gets the same array object again.
        """
        if count not in self._prompts:
            whole = self._prompts[self._count]
            self._prompts[count] = {name: _last(array, count) for name, array in whole.items()}
        return self._prompts[count]

    def _run_time(self, time: Engine, timesteps: list[float]) -> dict[float, tuple[Feeds, Feeds]]:
        """Return the time part's outputs for each timestep: one row per image, and shared ones."""
        conditioning = _inputs_of(time, self._rows)
        rows = self._count if conditioning else 1
        tiled = {
            name: np.concatenate([on_host(a)] * len(timesteps)) for name, a in conditioning.items()
        }
        numbers = np.repeat(timesteps, rows).astype(time.component.inputs["timestep"].dtype)
        outputs = time.run_unconverted({"timestep": numbers, **tiled})
        return {
            timestep: self._split(
                {name: array[start : start + rows] for name, array in outputs.items()},
                per_row=bool(conditioning),
            )
            for timestep, start in zip(timesteps, range(0, len(numbers), rows), strict=True)
        }

    def _split(self, outputs: Feeds, *, per_row: bool) -> tuple[Feeds, Feeds]:
        """Split tensors into those with a row per row of the sample, and those with one for all."""
        specs = self._engines.step.component.inputs
        batch = specs["sample"].shape[0]
        names = [name for name in outputs if per_row and specs[name].shape[0] == batch]
        shared = {name: array[:1] for name, array in outputs.items() if name not in names}
        return {name: outputs[name] for name in names}, shared


def _last(tensor: Tensor, count: int) -> Tensor:
    """Return the last rows of an array; the same object if that is all of it."""
    return tensor if count == len(tensor) else on_host(tensor)[-count:]


def _inputs_of(engine: Engine, rows: Mapping[str, _T]) -> dict[str, _T]:
    """Return the tensors that are inputs of the engine."""
    return {name: tensor for name, tensor in rows.items() if name in engine.component.inputs}


def _timestep_input(engine: Engine, timestep: float) -> dict[str, NDArray[Any]]:
    """Return the timestep input of a whole denoiser: one number, of shape [1] or []."""
    spec = engine.component.inputs.get("timestep")
    return {} if spec is None else {"timestep": np.full(spec.resolve({}), timestep, spec.dtype)}
