"""Proof that a sampler steps as the checkpoint's own diffusers scheduler does, without a network.

Both step side by side around a few closed-form networks, which bend the trajectory so that a wrong
level, coefficient, timestep or draw of noise shows. It takes milliseconds and no weights.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentforge.export.schedulers import SCHEDULERS, CheckpointScheduler, diffusers_scheduler
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

_STEPS = (1, 2, 4, 10, 16, 25, 50)
_STRENGTH = 0.6
_SHAPE = (2, 1, 1, 7)
_NUDGE = 3e-7  # an ulp or two of float32
_TINY_ALPHA = 1e-2
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
    counts, worst = [], 0.0
    for count in dict.fromkeys((steps, *_STEPS)):
        differences = [found for case in _cases(scheduler, count) if (found := _difference(scheduler, case)) is not None]
        if differences:
            counts.append(count)
            worst = max(worst, *differences)
        if not worst <= TOLERANCE:
            raise CheckpointError(
                f"scheduler_config.json: {scheduler.name} and the sampler {scheduler.sampler} differ by "
                f"{worst:.1g} of the range at {count} steps: to take another sampler, export with "
                "--sampler"
            )
    if steps not in counts:
        raise CheckpointError(
            f"scheduler_config.json: {scheduler.name} gives no finite numbers at {steps} steps"
        )
    return ScheduleProof(
        scheduler=scheduler.name,
        sampler=scheduler.sampler,
        options=scheduler.followed,
        steps=tuple(sorted(counts)),
        difference=worst,
    )


def _cases(scheduler: CheckpointScheduler, steps: int) -> Iterator[_Case]:
    networks = [partial(_denoiser, scheduler, std, bend) for std, bend in ((0.5, 0.2), (1.0, -0.4))]
    for network in networks:
        yield _Case(network=network, steps=steps)
    if int(steps * _STRENGTH):
        yield _Case(network=networks[0], steps=steps, strength=_STRENGTH)


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


def _difference(scheduler: CheckpointScheduler, case: _Case) -> float | None:
    """Return the largest difference of a run relative to its range, None if there is no run.

    Where alpha nearly vanishes, latents depend on differences that float32 hardly resolves. If that
    is more than the tolerance, eight times the change by an ulp of the network's output counts as
    equal there.
    """
    try:
        ours = _run(scheduler, case)
    except SettingsError:
        return None  # refused by name at run time too
    theirs = _run_diffusers(scheduler, case)
    if theirs is None or not np.isfinite(theirs.latents).all():
        return None
    found = ours.distance(theirs)
    if found <= TOLERANCE or _plan(scheduler, case).intervals[0].start.alpha > _TINY_ALPHA:
        return found
    nudged = _run_diffusers(scheduler, case, nudge=_NUDGE)
    limit = 8 * nudged.distance(theirs) if nudged else 0.0
    return found if found > limit else TOLERANCE


@dataclass(frozen=True, kw_only=True)
class _Trajectory:
    """Calls of the network in one run, and the latents at its end.

    Attributes:
        calls: input and timestep of each call.
        latents: what a VAE decodes.
    """

    calls: Sequence[tuple[Array, float]]
    latents: Array

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


def _plan(scheduler: CheckpointScheduler, case: _Case) -> NoisePlan:
    plan = sampling.noise_plan(scheduler.sampler, scheduler.schedule, case.steps)
    return plan.of_strength(case.strength)


def _run(scheduler: CheckpointScheduler, case: _Case) -> _Trajectory:
    """Run the runtime's sampler."""
    kind, plan, generator = prediction_type(scheduler.prediction), _plan(scheduler, case), Generator(0)
    calls: list[tuple[Array, float]] = []

    def denoise(x: Array, level: NoiseLevel) -> Array:
        kind.check(level)
        calls.append((x, level.timestep))
        return kind.clean(x, case.network(x, level.timestep), level)

    start, latents = plan.intervals[0].start, None
    if case.strength < 1:
        noise = generator.randn(_SHAPE)
        latents = np.float32(start.alpha) * _IMAGE + np.float32(start.sigma) * noise
    *_, last = sampling.get(scheduler.sampler).run(
        denoise,
        plan,
        lambda: generator.randn(_SHAPE),
        prediction=scheduler.prediction,
        latents=latents,
    )
    return _Trajectory(calls=calls, latents=last.latents)


def _run_diffusers(
    scheduler: CheckpointScheduler, case: _Case, nudge: float = 0.0
) -> _Trajectory | None:
    """Run the loop of a diffusers pipeline; None if the scheduler breaks at this number of steps."""
    row = SCHEDULERS[scheduler.sampler]
    own = scheduler.name in (row.scheduler, *sampling.get(scheduler.sampler).diffusers.aliases)
    name = scheduler.name if own else row.scheduler
    theirs = diffusers_scheduler(name, scheduler.config, **row.options)
    try:
        with torch.inference_mode(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _set_timesteps(scheduler, theirs, case.steps)
            return _loop(theirs, case, nudge)
    except (ArithmeticError, AssertionError, IndexError, NameError, RuntimeError, TypeError, ValueError):
        return None


def _set_timesteps(scheduler: CheckpointScheduler, theirs: Any, steps: int) -> None:
    explicit = SCHEDULERS[scheduler.sampler].timesteps
    if explicit and isinstance(scheduler.schedule, Schedule):
        theirs.set_timesteps(timesteps=explicit(scheduler.schedule, steps))
    else:
        theirs.set_timesteps(steps)


def _loop(theirs: Any, case: _Case, nudge: float) -> _Trajectory:
    first = (case.steps - int(case.steps * case.strength)) * theirs.order
    if hasattr(theirs, "set_begin_index"):  # else it searches, and fails where two are equal
        theirs.set_begin_index(first)
    generator = torch.Generator("cpu").manual_seed(0)
    takes_generator = "generator" in inspect.signature(theirs.step).parameters
    options = {"generator": generator} if takes_generator else {}
    times = theirs.timesteps[first:]
    noise = torch.randn(_SHAPE, generator=generator)
    x = noise * theirs.init_noise_sigma * (1 + nudge)
    if case.strength < 1:
        x = theirs.add_noise(torch.from_numpy(_IMAGE), noise, times[:1])
    calls = []
    for t in times:
        seen = theirs.scale_model_input(x, t).numpy()
        calls.append((seen, float(t)))
        output = torch.from_numpy(case.network(seen, float(t))) * (1 + nudge)
        x = theirs.step(output, t, x, **options, return_dict=False)[0]
    return _Trajectory(calls=calls, latents=x.numpy())
