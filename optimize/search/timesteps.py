"""Timesteps for few steps, chosen for one model: those that come nearest to many steps.

A sampler's own spacing knows the schedule, not the model, and the fewer the steps the more that
costs. Sabour et al. (2024, arXiv 2404.14507) align timesteps with a model by a bound on the error;
here the error itself is measured, as the distance of final latents to those of many steps at equal
seeds, and made less by moving one timestep at a time.
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

__all__ = ["ALIGNED", "SOLVERS", "Distance", "Found", "Timesteps", "search", "spacings"]

Timesteps = tuple[float, ...]
"""The model's, strictly falling and whole: some engines take nothing between."""

Distance = Callable[[str, Timesteps], float]
"""How far a sampler along some timesteps ends from many steps; less is nearer."""

ALIGNED: Mapping[str, Timesteps] = {
    "ays_sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "ays_sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}
"""Sabour et al.'s for Stable Diffusion 1.5 and XL, of 1000 training timesteps."""

SOLVERS = ("dpmpp_2m", "unipc", "euler")
"""Samplers without noise of their own that take any timesteps, the usual one first."""

_TRAINED = 1000  # timesteps of ALIGNED
_FIRST_MOVE = 1 / 2  # of the way to a neighbour
_LAST_MOVE = 1 / 16


@dataclass(frozen=True, kw_only=True)
class Found:
    """The nearest that was found.

    Attributes:
        sampler, timesteps: what it is.
        start: the spacing that it was made of, a name of spacings().
        distance: its own.
        own: that of each sampler along its own spacing.
        evaluations: how many distances were measured.
    """

    sampler: str
    timesteps: Timesteps
    start: str
    distance: float
    own: Mapping[str, float]
    evaluations: int


def search(
    schedule: Schedule,
    steps: int,
    distance: Distance,
    *,
    solvers: tuple[str, ...] = SOLVERS,
    moves: int = 48,
) -> Found:
    """The sampler and the timesteps that come nearest to many steps.

    Every sampler is tried along every spacing, and the best of them is moved, one timestep after
    the other and the first one never, towards its neighbours and back, by ever less. The same
    distances give the same result.

    Args:
        schedule: the model's.
        steps: how many timesteps.
        distance: what to make less; it is asked once for every pair, and for every move.
        solvers: names of samplers that take any timesteps.
        moves: the most that are tried; 0 takes the best spacing as it is.

    Raises:
        SettingsError: a sampler takes no timesteps but its own, or not so many.
    """
    tried = {
        (solver, name): (distance(solver, times), times)
        for solver in solvers
        for name, times in spacings(schedule, solver, steps).items()
    }
    (solver, start), (least, times) = min(tried.items(), key=lambda item: item[1][0])
    made = list(_descent(times, least, partial(distance, solver), moves))
    times, least = made[-1] if made else (times, least)
    return Found(
        sampler=solver,
        timesteps=times,
        start=start,
        distance=least,
        own={solver: tried[solver, "own"][0] for solver in solvers},
        evaluations=len(tried) + len(made),
    )


def spacings(schedule: Schedule, sampler: str, steps: int) -> dict[str, Timesteps]:
    """Timesteps to begin with, by name, each list once: ``own`` is the sampler's.

    ``trailing`` is that of Lin et al. (2023), arXiv 2305.08891; ``karras`` has the levels of Karras
    et al. (2022), equation 5; the others are ALIGNED, between whose timesteps those of another
    number are interpolated on a line in their logarithms.

    Raises:
        SettingsError: the sampler takes no timesteps but its own, or not so many.
    """
    own = sampling.get(sampler)
    if own.plan_from_timesteps is None:
        raise SettingsError(f"{sampler} takes no timesteps but its own: search for another sampler")
    found = {"own": _whole(own.plan(schedule, steps))}
    others: Mapping[str, tuple[Planner, Schedule]] = {
        "trailing": (plan_dpm, replace(schedule, spacing="trailing")),
        "karras": (plan_dpm_karras, schedule),
    }
    for name, (plan, like) in others.items():
        found[name] = _whole(plan(like, steps))
    for name, aligned in ALIGNED.items():
        found[name] = _resampled(aligned, steps, schedule.train_steps)
    unique = {times: name for name, times in reversed(found.items())}
    return {
        name: found[name] for name in found if unique[found[name]] == name and _falls(found[name])
    }


def _whole(plan: NoisePlan) -> Timesteps:
    return tuple(float(round(level.timestep)) for level, _ in plan.intervals)


def _resampled(aligned: Timesteps, steps: int, total: int) -> Timesteps:
    """As many timesteps of a model that was trained on so many, on a line in their logarithms."""
    places = np.linspace(0, len(aligned) - 1, steps)
    logs = np.interp(places, np.arange(len(aligned)), np.log(aligned))
    scaled = np.round(np.exp(logs) * (total - 1) / (_TRAINED - 1))
    return tuple(scaled.tolist())


def _falls(times: Timesteps) -> bool:
    return all(later < earlier for earlier, later in pairwise(times))


def _descent(
    times: Timesteps, least: float, distance: Callable[[Timesteps], float], moves: int
) -> Iterator[tuple[Timesteps, float]]:
    """The best so far after each of the moves: coordinate descent, by shares of the gaps."""
    share = _FIRST_MOVE
    while moves and share >= _LAST_MOVE and len(times) > 1:
        before = least
        for index in range(1, len(times)):
            for moved in _moved(times, index, share):
                if not moves:
                    return
                moves -= 1
                found = distance(moved)
                better = found < least
                if better:
                    times, least = moved, found
                yield times, least
                if better:
                    break
        if least == before:
            share /= 2


def _moved(times: Timesteps, index: int, share: float) -> Iterator[Timesteps]:
    """One timestep a share of the way to each neighbour; what rounds to no move is none."""
    here = times[index]
    below = times[index + 1] if index + 1 < len(times) else 0.0
    for neighbour in (below, times[index - 1]):
        there = here + math.trunc((neighbour - here) * share)
        if there not in (here, neighbour):
            yield (*times[:index], there, *times[index + 1 :])
