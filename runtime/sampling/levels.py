"""Noise levels, and the plan of the levels that one sampling run visits."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.options import DEFAULT_OPTIONS, SolverOptions

__all__ = ["CLEAN", "NoiseInterval", "NoiseLevel", "NoisePlan", "SolverStep", "chain"]

_RUNGE_KUTTA = 9  # further evaluations of PNDM's three Runge-Kutta steps


class NoiseLevel(NamedTuple):
    """One point of a noise schedule: x = alpha * clean + sigma * noise.

    Both coefficients are finite at zero terminal SNR, where alpha is 0. The timestep is the
    network's input and may be fractional. It has no meaning at a level where the network is not
    evaluated, such as the last one.
    """

    alpha: float
    sigma: float
    timestep: float

    @property
    def log_snr(self) -> float:
        """log(alpha / sigma), the lambda of Lu et al. (2022); infinite if alpha or sigma is 0."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


CLEAN = NoiseLevel(1.0, 0.0, 0.0)
"""Level without noise, where most samplers end."""


class NoiseInterval(NamedTuple):
    """One sampler step: from a noise level to a lower one (or, at the end, the same one)."""

    start: NoiseLevel
    end: NoiseLevel


class SolverStep(NamedTuple):
    """Particulars of a method in one interval, which depend on the complete plan.

    Attributes:
        order: highest order of the method in this interval.
        correct: False if UniPC does not correct the step that ends where this one starts.
        weights: of the last outputs of a linear multistep method, latest first.
        middle: level at which a method of order two evaluates the network again.
    """

    order: int = 1
    correct: bool = True
    weights: tuple[float, ...] = ()
    middle: NoiseLevel | None = None


@dataclass(frozen=True)
class NoisePlan:
    """Steps of one sampling run. An interval usually starts where the previous one ended.

    Sampling starts from `scale` times standard normal noise, or from an image noised to the
    start of the first interval. A plan without its first intervals needs the latter.

    Attributes:
        intervals: one per evaluation of the network; Heun's method evaluates it twice in each.
        scale: standard deviation of the initial latents.
        repeat_intervals: for PNDM, whose second evaluation repeats the first step; one for every
            interval but the first: the interval that replaces it if it is evaluated second.
        solver: particulars of the method, one per interval; empty: the method's defaults.
        options: options of the method.
        runge_kutta: True if the first twelve intervals are the evaluations of PNDM's three
            Runge-Kutta steps. Such a plan cannot be divided.
    """

    intervals: tuple[NoiseInterval, ...]
    scale: float = 1.0
    repeat_intervals: tuple[NoiseInterval, ...] = ()
    solver: tuple[SolverStep, ...] = ()
    options: SolverOptions = DEFAULT_OPTIONS
    runge_kutta: bool = False

    @property
    def steps(self) -> int:
        """Number of steps of a complete plan, not counting PNDM's further evaluations."""
        extra = _RUNGE_KUTTA if self.runge_kutta else bool(self.repeat_intervals)
        return len(self.intervals) - extra

    @property
    def solver_steps(self) -> tuple[SolverStep | None, ...]:
        """Particulars of the method for each interval, None where there are none."""
        return self.solver or (None,) * len(self.intervals)

    @property
    def timesteps(self) -> list[float]:
        """Timestep at the start of each interval."""
        return [interval.start.timestep for interval in self.intervals]

    def after(self, count: int) -> "NoisePlan":
        """Return the plan without its first `count` intervals, for a run that starts late.

        PNDM then repeats the first of the remaining steps, as it does in diffusers, so the
        interval after it is never covered. That is hardly what its authors intended.
        """
        if not count:
            return self
        self._check_divisible()
        return dataclasses.replace(
            self,
            intervals=self.intervals[count:],
            repeat_intervals=self.repeat_intervals[count:],
            solver=self.solver[count:],
        )

    def until(self, count: int) -> "NoisePlan":
        """Return the first `count` intervals, for a run that ends early with noise left."""
        if count >= len(self.intervals):
            return self
        self._check_divisible()
        return dataclasses.replace(
            self, intervals=self.intervals[:count], solver=self.solver[:count]
        )

    def _check_divisible(self) -> None:
        if self.runge_kutta:
            raise SettingsError(
                "PNDM with Runge-Kutta steps takes all steps from pure noise: for images and for "
                "parts of a run set sampler to pndm"
            )

    def of_strength(self, strength: float) -> "NoisePlan":
        """Return the last part of a complete plan, for image-to-image.

        SDEdit (Meng et al. 2022). The number of steps is rounded down, as in diffusers.

        Args:
            strength: fraction of the steps to keep, from 0 to 1.

        Raises:
            SettingsError: strength is out of range, or leaves no step.
        """
        if not 0 <= strength <= 1:
            raise SettingsError(f"strength must be between 0 and 1, not {strength:g}")
        kept = int(self.steps * strength)
        if not kept:
            raise SettingsError(
                f"strength {strength:g} of {self.steps} steps leaves no step: increase either"
            )
        return self.after(self.steps - kept)

    def between(self, train_steps: int, *, start: float = 0.0, end: float = 1.0) -> "NoisePlan":
        """Return the steps of a complete plan between two fractions of the way to the image.

        These are diffusers' denoising_start and denoising_end, with which a base model hands over
        to a refiner (Podell et al. 2023, arXiv 2307.01952, section 2.5). Parts that share a
        boundary share no step and skip none. This also holds for Heun's method, where diffusers
        does half of a step in the first part and the whole step again in the second.

        Args:
            train_steps: training timesteps of the schedule.
            start, end: fractions from 0 to 1.

        Raises:
            SettingsError: the fractions are out of range or order, or no step lies between them.
        """
        if not 0 <= start < end <= 1:
            raise SettingsError(
                f"denoising_start {start:g} and denoising_end {end:g}: give two numbers between "
                "0 and 1, the start below the end"
            )
        skipped, kept = (
            sum(time >= round(train_steps - part * train_steps) for time in self.timesteps)
            for part in (start, end)
        )
        if skipped >= kept:
            raise SettingsError(
                f"{self.steps} steps: none lies between denoising_start {start:g} and "
                f"denoising_end {end:g}; use more steps"
            )
        return self.until(kept).after(skipped)


def chain(levels: Sequence[NoiseLevel], last: NoiseLevel = CLEAN) -> tuple[NoiseInterval, ...]:
    """Return the intervals from each level to the next, and from there to the last one.

    Raises:
        SettingsError: two successive levels have the same noise. (The last may repeat it: some
            schedules of diffusers end on the level of their last timestep.)
    """
    intervals = tuple(NoiseInterval(*pair) for pair in pairwise([*levels, last]))
    for start, end in intervals if last is CLEAN else intervals[:-1]:
        if start.log_snr >= end.log_snr:
            raise SettingsError(
                f"{len(levels)} steps are too many: the step at timestep {start.timestep:g} would "
                "remove no noise; use fewer"
            )
    return intervals
