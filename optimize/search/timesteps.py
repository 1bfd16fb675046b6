"""Search for timesteps of a short schedule that come closest to a long one, for one model.

A sampler's own spacing knows the noise schedule but not the model, and the fewer the steps the more
that costs. Sabour et al. (2024, arXiv 2404.14507, "Align Your Steps") optimize timesteps for a
model by a bound on the error. Here the error itself is measured: the distance of final latents to
those of many steps at equal seeds. Coordinate descent moves one timestep at a time to reduce it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from msgspec.structs import replace

from latentforge.runtime import sampling
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.dpmpp_2m import plan_dpm, plan_dpm_karras
from latentforge.runtime.sampling.levels import NoisePlan
from latentforge.runtime.sampling.sampler import Planner
from latentforge.runtime.sampling.schedule import Schedule

__all__ = [
    "ALIGNED",
    "SOLVERS",
    "Distance",
    "TimestepResult",
    "Timesteps",
    "search_timesteps",
    "spacings",
]

Timesteps = tuple[float, ...]
"""Timesteps of the model, strictly decreasing; whole numbers, since some engines take no others."""

Distance = Callable[[str, Timesteps], float]
"""Distance between the results of a sampler at these timesteps and those of many steps."""

ALIGNED: Mapping[str, Timesteps] = {
    "ays_sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "ays_sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}
"""Timesteps of Sabour et al. for Stable Diffusion 1.5 and XL, of 1000 training timesteps."""

SOLVERS = ("dpmpp_2m", "unipc", "euler")
"""Deterministic samplers that take any timesteps, the default first."""

_TRAIN_STEPS = 1000  # that ALIGNED refers to
_FIRST_MOVE = 1 / 2  # fraction of the gap to a neighbour
_LAST_MOVE = 1 / 16


@dataclass(frozen=True, kw_only=True)
class TimestepResult:
    """Sampler and timesteps with the smallest distance that was found.

    Attributes:
        sampler: one of the solvers.
        timesteps: one per step.
        start: the spacing that the descent started from, a name of spacings().
        distance: of the result.
        own: distance of each sampler with its own spacing.
        evaluations: number of distances that were measured.
    """

    sampler: str
    timesteps: Timesteps
    start: str
    distance: float
    own: Mapping[str, float]
    evaluations: int


def search_timesteps(
    schedule: Schedule,
    steps: int,
    distance: Distance,
    *,
    solvers: tuple[str, ...] = SOLVERS,
    moves: int = 48,
) -> TimestepResult:
    """Find the sampler and the timesteps that come closest to many steps.

    Every sampler is tried with every spacing. The timesteps of the best pair, except the first,
    are then moved one by one towards their neighbours, by decreasing fractions of the gaps. The
    search is deterministic: equal distances give an equal result.

    Args:
        schedule: noise schedule of the model.
        steps: number of timesteps.
        distance: to minimize; evaluated once per pair and once per move.
        solvers: names of samplers that take any timesteps.
        moves: number of moves tried, at most; 0 returns the best spacing unchanged.

    Raises:
        SettingsError: a sampler does not take timesteps, or ``steps`` is out of range.
    """
    measured = {
        (solver, name): (distance(solver, timesteps), timesteps)
        for solver in solvers
        for name, timesteps in spacings(schedule, solver, steps).items()
    }
    (solver, start), (best, timesteps) = min(measured.items(), key=lambda item: item[1][0])
    trace = list(_descend(timesteps, best, partial(distance, solver), moves))
    timesteps, best = trace[-1] if trace else (timesteps, best)
    return TimestepResult(
        sampler=solver,
        timesteps=timesteps,
        start=start,
        distance=best,
        own={solver: measured[solver, "own"][0] for solver in solvers},
        evaluations=len(measured) + len(trace),
    )


def spacings(schedule: Schedule, sampler: str, steps: int) -> dict[str, Timesteps]:
    """Return timesteps to start a search from, by name, without duplicates.

    ``own`` is the sampler's spacing. ``trailing`` is that of Lin et al. (2023), arXiv 2305.08891.
    ``karras`` has the noise levels of Karras et al. (2022), equation 5. The others are ALIGNED,
    interpolated log-linearly for other numbers of steps.

    Raises:
        SettingsError: the sampler does not take timesteps, or ``steps`` is out of range.
    """
    method = sampling.get(sampler)
    if method.plan_from_timesteps is None:
        raise SettingsError(f"{sampler} takes no timesteps but its own: search for another sampler")
    found = {"own": _whole(method.plan(schedule, steps))}
    planners: Mapping[str, tuple[Planner, Schedule]] = {
        "trailing": (plan_dpm, replace(schedule, spacing="trailing")),
        "karras": (plan_dpm_karras, schedule),
    }
    for name, (plan, spaced) in planners.items():
        found[name] = _whole(plan(spaced, steps))
    for name, aligned in ALIGNED.items():
        found[name] = _resample(aligned, steps, schedule.train_steps)
    first_name = {timesteps: name for name, timesteps in reversed(found.items())}
    return {
        name: timesteps
        for name, timesteps in found.items()
        if first_name[timesteps] == name and _is_decreasing(timesteps)
    }


def _whole(plan: NoisePlan) -> Timesteps:
    return tuple(float(round(level.timestep)) for level, _ in plan.intervals)


def _resample(aligned: Timesteps, steps: int, train_steps: int) -> Timesteps:
    """Interpolate timesteps log-linearly for other numbers of steps and of training timesteps."""
    positions = np.linspace(0, len(aligned) - 1, steps)
    logs = np.interp(positions, np.arange(len(aligned)), np.log(aligned))
    scaled = np.round(np.exp(logs) * (train_steps - 1) / (_TRAIN_STEPS - 1))
    return tuple(scaled.tolist())


def _is_decreasing(timesteps: Timesteps) -> bool:
    return all(later < earlier for earlier, later in pairwise(timesteps))


def _descend(
    timesteps: Timesteps, best: float, distance: Callable[[Timesteps], float], moves: int
) -> Iterator[tuple[Timesteps, float]]:
    """Yield the best timesteps and their distance after each move of a coordinate descent."""
    fraction = _FIRST_MOVE
    while moves and fraction >= _LAST_MOVE and len(timesteps) > 1:
        previous = best
        for index in range(1, len(timesteps)):
            for moved in _moved(timesteps, index, fraction):
                if not moves:
                    return
                moves -= 1
                value = distance(moved)
                better = value < best
                if better:
                    timesteps, best = moved, value
                yield timesteps, best
                if better:
                    break
        if best == previous:
            fraction /= 2


def _moved(timesteps: Timesteps, index: int, fraction: float) -> Iterator[Timesteps]:
    """Yield the timesteps with one moved towards each neighbour, unless rounding undoes it."""
    current = timesteps[index]
    below = timesteps[index + 1] if index + 1 < len(timesteps) else 0.0
    for neighbour in (below, timesteps[index - 1]):
        moved = current + math.trunc((neighbour - current) * fraction)
        if moved not in (current, neighbour):
            yield (*timesteps[:index], moved, *timesteps[index + 1 :])
