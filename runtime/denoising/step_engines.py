"""The UNet, whole or in parts: what runs once a prompt, once a schedule, and every step.

docs/format.md says what the parts take and give. An engine directory of a whole UNet has the last
alone.

Where that is split too, a step may leave out the deep layers and go on from what they gave at an
earlier one: DeepCache, Ma et al. (2023), arXiv 2312.00858.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.engine import Engine
from latentforge.runtime.manifest import CACHED_FEATURE, DenoiserVariant
from latentforge.runtime.profiling import Stopwatch
from latentforge.runtime.tensor import Feeds, TensorSpec

__all__ = ["ConditionedDenoiser", "StepEngines"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class StepEngines:
    """The engines of a UNet. Threads may share it.

    Attributes:
        step: runs every step.
        prompt: runs once a request, on rows that are the step's.
        time: runs for all timesteps of a schedule at once, each of them a row, or as many rows as
            the step has where it is told of the prompts too.
        shallow: the step without its deep layers, if some are to be left out.
    """

    step: Engine
    prompt: Engine | None = None
    time: Engine | None = None
    shallow: Engine | None = None

    @classmethod
    def of(
        cls,
        engines: Mapping[str, Engine],
        step: DenoiserVariant = "denoiser",
        *,
        shallow: bool = False,
    ) -> "StepEngines":
        """The UNet among the loaded components, with or without shallow steps."""
        return cls(
            step=engines[step],
            prompt=engines.get("denoiser_prompt"),
            time=engines.get("denoiser_time"),
            shallow=engines["denoiser_cached"] if shallow else None,
        )

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """What a whole UNet would take: inputs of a part that no other part gives."""
        engines = [engine for engine in (self.prompt, self.time) if engine is not None]
        given = {name for engine in engines for name in engine.component.outputs}
        specs: dict[str, TensorSpec] = {}
        for engine in (*engines, self.step):
            specs |= engine.component.inputs
        return {name: spec for name, spec in specs.items() if name not in given}

    def conditioned(
        self,
        rows: Feeds,
        timesteps: Iterable[float],
        watch: Stopwatch,
        max_rows: int | None = None,
    ) -> "ConditionedDenoiser":
        """What predicts the noise for one request.

        Args:
            rows: all inputs but sample and timestep, with a row a sample.
            timesteps: those that will be asked for; others may be too, and take longer.
            watch: told of every run of a part.
        """
        given: Feeds = {}
        if self.prompt is not None:
            with watch.stage("denoiser_prompt"):
                given = self.prompt.run_as_it_is(_only(self.prompt, rows))
        told = ConditionedDenoiser(self, {**rows, **given}, watch, max_rows)
        told.prepare(timesteps)
        return told


class ConditionedDenoiser:
    """A UNet that knows its prompts, for one request.

    It keeps what it knows of timesteps, and the deep feature of the last full step, which no other
    request ever sees.
    """

    def __init__(
        self, unet: StepEngines, rows: Feeds, watch: Stopwatch, max_rows: int | None
    ) -> None:
        self._max_rows = max_rows
        self._unet = unet
        self._rows = rows
        self._count = len(next(iter(rows.values())))
        self._prompts = {self._count: unet.step.prepared(_only(unet.step, rows))}
        self._watch = watch
        self._known: dict[float, tuple[Feeds, Feeds]] = {}
        self._deep: Array | None = None

    def predict(self, sample: Array, timestep: float, *, shallow: bool = False) -> Array:
        """The output for a sample (rows, channels, h, w), in float32.

        Args:
            sample: with as many rows as it was told of, or fewer: then they are the last of them.
            timestep: of all rows.
            shallow: go on from the deep feature of the last full step. Where that had fewer rows,
                or there was none, this becomes a full one: right before fast.
        """
        self.prepare([timestep])
        count = len(sample)
        rows, shared = self._known[timestep]
        own = {name: _last(array, count) for name, array in rows.items()}
        given = {"sample": sample, **self._told(count), **own}
        deep = self._deep
        if shallow and self._unet.shallow and deep is not None and count <= len(deep):
            given[CACHED_FEATURE] = _last(deep, count)
            return self._run_step("denoiser_cached", self._unet.shallow, given, shared, timestep)
        return self._run_step("denoiser", self._unet.step, given, shared, timestep)

    def _run_step(
        self, stage: str, engine: Engine, rows: Feeds, shared: Feeds, timestep: float
    ) -> Array:
        constant = {**_only(engine, shared), **_timestep(engine, timestep)}
        with self._watch.stage(stage):
            outputs = engine.run(_only(engine, rows), constant, max_rows=self._max_rows)
        if self._unet.shallow and CACHED_FEATURE in outputs:
            self._deep = outputs[CACHED_FEATURE]
        return outputs["out_sample"]

    def _told(self, count: int) -> Feeds:
        """What the last rows are told of the prompts; cut once, as backends know arrays again."""
        if count not in self._prompts:
            whole = self._prompts[self._count]
            self._prompts[count] = {name: _last(array, count) for name, array in whole.items()}
        return self._prompts[count]

    def prepare(self, timesteps: Iterable[float]) -> None:
        """Run the time part for those timesteps that are new."""
        new = [timestep for timestep in dict.fromkeys(timesteps) if timestep not in self._known]
        time = self._unet.time
        if time is None:
            self._known |= dict.fromkeys(new, ({}, {}))
        elif new:
            with self._watch.stage("denoiser_time"):
                self._known |= self._run_time(time, new)

    def _run_time(self, time: Engine, timesteps: list[float]) -> dict[float, tuple[Feeds, Feeds]]:
        """What the time part gives for each timestep: by row, and shared by all rows."""
        told = _only(time, self._rows)
        rows = self._count if told else 1
        tiled = {name: np.concatenate([array] * len(timesteps)) for name, array in told.items()}
        numbers = np.repeat(timesteps, rows).astype(time.component.inputs["timestep"].dtype)
        outputs = time.run_as_it_is({"timestep": numbers, **tiled})
        parts = {
            timestep: {name: array[start : start + rows] for name, array in outputs.items()}
            for timestep, start in zip(timesteps, range(0, len(numbers), rows), strict=True)
        }
        return {timestep: self._divided(part, own=bool(told)) for timestep, part in parts.items()}

    def _divided(self, part: Feeds, *, own: bool) -> tuple[Feeds, Feeds]:
        """Tensors with the rows of the sample, and those with one row for all of them."""
        specs = self._unet.step.component.inputs
        batch = specs["sample"].shape[0]
        rows = {name: part[name] for name in part if own and specs[name].shape[0] == batch}
        return rows, {name: array[:1] for name, array in part.items() if name not in rows}


def _last(array: NDArray[Any], count: int) -> NDArray[Any]:
    """The last rows of an array; the very same one where that is all of it."""
    return array if count == len(array) else array[-count:]


def _only(engine: Engine, rows: Feeds) -> dict[str, NDArray[Any]]:
    """Those that the engine takes."""
    return {name: array for name, array in rows.items() if name in engine.component.inputs}


def _timestep(engine: Engine, timestep: float) -> dict[str, NDArray[Any]]:
    """The timestep as a whole UNet takes it: one number, of shape [1] or []."""
    spec = engine.component.inputs.get("timestep")
    return {} if spec is None else {"timestep": np.full(spec.resolve({}), timestep, spec.dtype)}
