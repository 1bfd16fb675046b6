"""Proof that a sampler steps as the checkpoint's own diffusers scheduler does, without a network.

Both step side by side around a few closed-form networks, which bend the trajectory so that a wrong
level, coefficient, timestep or draw of noise shows. It takes milliseconds and no weights.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentforge.export.schedulers import (
    SCHEDULERS,
    CheckpointScheduler,
    diffusers_scheduler,
    quiet_diffusers,
)
from latentforge.runtime import sampling
from latentforge.runtime.errors import CheckpointError, SettingsError
from latentforge.runtime.manifest import ScheduleProof
from latentforge.runtime.rng import Generator
from latentforge.runtime.sampling.levels import NoiseLevel, NoisePlan
from latentforge.runtime.sampling.prediction import prediction_type
from latentforge.runtime.sampling.schedule import Schedule

__all__ = ["TOLERANCE", "prove_schedule"]

TOLERANCE = 1e-4
"""Largest difference that counts as equal, relative to the range of the latents."""

Array = NDArray[np.float32]
Network = Callable[[Array, float], Array]
"""(input, timestep) -> output of a network."""

_STEPS = (1, 2, 4, 10, 25)
_NETWORKS = (0.5, 0.2), (1.0, -0.4)  # deviation of the data, and how much it is bent
_STRENGTH = 0.6
_SHAPE = (2, 1, 1, 7)
_NUDGE = 1e-7  # an ulp of float32
_BREAKS = (
    ArithmeticError,
    AssertionError,
    IndexError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that schedulers of diffusers raise at numbers of steps that they cannot take."""
_IMAGE = np.cos(np.arange(14, dtype=np.float32)).reshape(_SHAPE)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One run to compare.

    Attributes:
        network: closed-form network.
        steps: number of steps.
        strength: below 1, the run starts from a noised image.
    """

    network: Network
    steps: int
    strength: float = 1.0


def prove_schedule(scheduler: CheckpointScheduler, steps: int) -> ScheduleProof:
    """Compare a sampler with the diffusers scheduler that it stands for.

    The latents after every step are compared, for the default number of steps and several others,
    from noise and from a noised image. Numbers of steps that diffusers or the sampler refuses, or
    for which diffusers has no finite numbers, are left out.

    Args:
        scheduler: of the checkpoint, with the sampler.
        steps: default number of steps.

    Raises:
        CheckpointError: they differ, or have no finite numbers at the default number of steps.
    """
    proof = _Proof(scheduler)
    counts, worst = [], 0.0
    for count in dict.fromkeys((steps, *_STEPS)):
        found = [proof.difference(case) for case in _cases(scheduler, count, full=count == steps)]
        differences = [difference for difference in found if difference is not None]
        if differences:
            counts.append(count)
        worst = max(worst, *differences, 0.0)
        if worst > TOLERANCE:
            raise CheckpointError(
                f"scheduler_config.json: {scheduler.name} and the sampler {scheduler.sampler} "
                f"differ by {worst:.1g} of the range at {count} steps: to take another sampler, "
                "export with --sampler"
            )
    if steps not in counts:
        raise CheckpointError(
            f"scheduler_config.json: {scheduler.name} gives no finite numbers at {steps} steps, or "
            "takes other numbers alone: to take another sampler, export with --sampler"
        )
    return ScheduleProof(
        scheduler=scheduler.name,
        sampler=scheduler.sampler,
        options=scheduler.followed,
        steps=tuple(sorted(counts)),
        difference=worst,
    )


def _cases(scheduler: CheckpointScheduler, steps: int, *, full: bool) -> Iterator[_Case]:
    """Yield the runs to compare for a number of steps: one, or all of them."""
    gentle, strong = (partial(_denoiser, scheduler, *shape) for shape in _NETWORKS)
    yield _Case(network=strong, steps=steps)
    if full:
        yield _Case(network=gentle, steps=steps)
        if int(steps * _STRENGTH):
            yield _Case(network=gentle, steps=steps, strength=_STRENGTH)


def _denoiser(
    scheduler: CheckpointScheduler, std: float, bend: float, x: Array, timestep: float
) -> Array:
    """Evaluate a network for Gaussian data of a deviation, bent smoothly by position and time."""
    level = _level(scheduler, timestep)
    wide = x.astype(np.float64)
    variance = (level.alpha * std) ** 2 + level.sigma**2
    clean = wide * level.alpha * std**2 / variance
    clean += bend * np.sin(2 * wide[..., ::-1] + timestep / 200)
    kind = prediction_type(scheduler.prediction)
    return kind.output(x, clean.astype(np.float32), level)


def _level(scheduler: CheckpointScheduler, timestep: float) -> NoiseLevel:
    """Return the level that a network takes a timestep for; it need not be exact."""
    schedule = scheduler.schedule
    if not isinstance(schedule, Schedule):
        return schedule.level(math.exp(4 * timestep))
    if schedule.options.continuous_timesteps and timestep <= 4:
        ratio = math.exp(4 * timestep)
        return NoiseLevel(1 / math.hypot(ratio, 1), ratio / math.hypot(ratio, 1), timestep)
    table = schedule.alphas_cumprod
    square = max(float(np.interp(timestep, np.arange(len(table)), table)), 1e-10)
    return NoiseLevel(math.sqrt(square), math.sqrt(max(1 - square, 1e-10)), timestep)


class _Proof:
    """Runs of a sampler and of the diffusers scheduler that it stands for."""

    def __init__(self, scheduler: CheckpointScheduler) -> None:
        row, own = SCHEDULERS[scheduler.sampler], scheduler.name
        counterpart = sampling.get(scheduler.sampler).diffusers
        name = own if own in (row.scheduler, *counterpart.aliases) else row.scheduler
        self._scheduler = scheduler
        self._theirs = diffusers_scheduler(name, scheduler.config, **row.options)
        if isinstance(scheduler.schedule, Schedule) and scheduler.schedule.zero_terminal_snr:
            self._share_table(scheduler.schedule)

    def _share_table(self, schedule: Schedule) -> None:
        """Give the diffusers scheduler the runtime's table of a rescaled schedule.

        torch takes its square roots from MKL, which are not always rounded to nearest, and late
        timesteps magnify the last bit. A difference in more than that stays, and shows.
        """
        table = self._theirs.alphas_cumprod
        ours = torch.from_numpy(schedule.alphas_cumprod.copy())
        if torch.allclose(table[:-1], ours[:-1], rtol=1e-6, atol=1e-7):
            table[:-1] = ours[:-1]

    def difference(self, case: _Case) -> float | None:
        """Return the largest difference of a run relative to its range, None if there is no run.

        Some schedulers magnify the last bit of float32, above all where alpha nearly vanishes. Then
        it is the difference from the scheduler in float64 that counts, and what an ulp or two
        changes counts as equal.
        """
        try:
            plan = self._plan(case)
            ours = self._run(case, plan)
        except SettingsError:
            return None  # refused by name at run time too
        theirs = self._run_diffusers(case)
        if theirs is None or not theirs.is_finite:
            return None
        found = ours.distance(theirs)
        if found > TOLERANCE and (wide := self._run_diffusers(case, wide=True)):
            found = min(found, ours.distance(wide))
        if found <= TOLERANCE:
            return found
        return TOLERANCE if found <= self._resolution(case, plan, theirs) else found

    def _resolution(self, case: _Case, plan: NoisePlan, theirs: "_Trajectory") -> float:
        """Return how far apart equal runs may be, because of float32.

        It is a few times what an ulp of latents and outputs changes, or the spacing of float32
        where diffusers keeps latents as clean + ratio * noise with a ratio in the thousands.
        """
        nudged = self._run_diffusers(case, nudge=_NUDGE)
        moved = nudged.distance(theirs) if nudged and nudged.is_finite else 0.0
        start, end = plan.intervals[0]
        return max(16 * moved, 4 * end.alpha / max(start.alpha, _NUDGE) * 2.0**-22)

    def _plan(self, case: _Case) -> NoisePlan:
        scheduler = self._scheduler
        plan = sampling.noise_plan(scheduler.sampler, scheduler.schedule, case.steps)
        return plan.of_strength(case.strength)

    def _run(self, case: _Case, plan: NoisePlan) -> "_Trajectory":
        """Run the runtime's sampler."""
        kind, generator = prediction_type(self._scheduler.prediction), Generator(0)
        calls: list[tuple[Array, float]] = []

        def denoise(x: Array, level: NoiseLevel) -> Array:
            kind.check(level)
            calls.append((x, level.timestep))
            return kind.clean(x, case.network(x, level.timestep), level)

        start, latents = plan.intervals[0].start, None
        if case.strength < 1:
            noise = generator.randn(_SHAPE)
            latents = np.float32(start.alpha) * _IMAGE + np.float32(start.sigma) * noise
        *_, last = sampling.get(self._scheduler.sampler).run(
            denoise,
            plan,
            lambda: generator.randn(_SHAPE),
            prediction=self._scheduler.prediction,
            latents=latents,
        )
        return _Trajectory(calls=calls, latents=last.latents)

    def _run_diffusers(
        self, case: _Case, *, nudge: float = 0.0, wide: bool = False
    ) -> "_Trajectory | None":
        """Run the loop of a diffusers pipeline; None if the scheduler breaks at this case.

        Args:
            case: the run.
            nudge: relative change of latents and outputs, at random.
            wide: compute in float64, as far as the scheduler can.
        """
        theirs = copy.deepcopy(self._theirs)  # some change their own configuration
        try:
            with torch.inference_mode(), np.errstate(all="ignore"), quiet_diffusers():
                self._set_timesteps(theirs, case.steps)
                if wide:
                    _widen(theirs)
                loop = partial(_loop, theirs, case, self._skipped(case))
                return loop(nudge, torch.float64 if wide else torch.float32)
        except _BREAKS:
            return None

    def _skipped(self, case: _Case) -> int:
        """Return the number of steps that a diffusers pipeline leaves out at the start."""
        explicit = SCHEDULERS[self._scheduler.sampler].timesteps
        steps = case.steps
        if explicit:
            steps = len(explicit(self._scheduler.schedule, steps))
        return steps - int(steps * case.strength)

    def _set_timesteps(self, theirs: Any, steps: int) -> None:
        explicit = SCHEDULERS[self._scheduler.sampler].timesteps
        if explicit:
            theirs.set_timesteps(timesteps=explicit(self._scheduler.schedule, steps))
        else:
            theirs.set_timesteps(steps)


@dataclass(frozen=True, kw_only=True)
class _Trajectory:
    """Calls of the network in one run, and the latents at its end.

    Attributes:
        calls: input and timestep of each call.
        latents: what a VAE decodes.
    """

    calls: Sequence[tuple[Array, float]]
    latents: Array

    @property
    def is_finite(self) -> bool:
        """True if all numbers are finite."""
        arrays = [*(x for x, _ in self.calls), self.latents]
        return all(bool(np.isfinite(array).all()) for array in arrays)

    def distance(self, other: "_Trajectory") -> float:
        """Return the largest difference from another run, relative to its range."""
        if len(self.calls) != len(other.calls):
            return math.inf
        pairs = [(a, b) for (a, _), (b, _) in zip(self.calls, other.calls, strict=True)]
        pairs.append((self.latents, other.latents))
        worst = [float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in pairs]
        times = zip(self.calls, other.calls, strict=True)
        worst += [abs(t - u) / max(1, abs(u)) for (_, t), (_, u) in times]
        return max(worst) if all(map(math.isfinite, worst)) else math.inf


def _widen(theirs: Any) -> None:
    """Give a scheduler its tables in float64: some take small differences of their logarithms."""
    for name in ("sigmas", "alphas_cumprod"):
        if hasattr(theirs, name):
            setattr(theirs, name, getattr(theirs, name).double())


def _loop(theirs: Any, case: _Case, skipped: int, nudge: float, dtype: torch.dtype) -> _Trajectory:
    first = skipped * theirs.order
    if hasattr(theirs, "set_begin_index"):  # else it searches, and fails where two are equal
        theirs.set_begin_index(first)
    generator = torch.Generator("cpu").manual_seed(0)
    accepted = inspect.signature(theirs.step).parameters
    options = {"generator": generator, "eta": 0.0}  # eta is the default of the pipelines
    options = {key: value for key, value in options.items() if key in accepted}
    times = theirs.timesteps[first:]
    noise = torch.randn(_SHAPE, generator=generator).to(dtype)
    x = noise * theirs.init_noise_sigma
    if case.strength < 1:
        x = theirs.add_noise(torch.from_numpy(_IMAGE), noise, times[:1])
    calls = []
    rounding = torch.Generator("cpu").manual_seed(1)
    for t in times:
        x = x * (1 + nudge * torch.randn(_SHAPE, generator=rounding))
        seen = theirs.scale_model_input(x, t).float().numpy()
        calls.append((seen, float(t)))
        output = torch.from_numpy(case.network(seen, float(t))).to(dtype)
        output = output * (1 + nudge * torch.randn(_SHAPE, generator=rounding))
        x = theirs.step(output, t, x, **options, return_dict=False)[0]
    return _Trajectory(calls=calls, latents=x.float().numpy())
