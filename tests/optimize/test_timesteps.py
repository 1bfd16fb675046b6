"""Search for timesteps, with the exact denoiser of a distribution in place of a network."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import SCHEDULE

from latentforge.optimize.search.timesteps import (
    ALIGNED,
    SOLVERS,
    Distance,
    search_timesteps,
    spacings,
)
from latentforge.runtime import sampling
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.sampling.levels import NoiseLevel, NoisePlan
from latentforge.runtime.sampling.sampler import Array
from latentforge.runtime.sampling.schedule import Schedule

SPREAD = 0.05


def denoise(x: Array, level: NoiseLevel) -> Array:
    """Return the mean of the clean value given x, for clean values around -1 and 1."""
    means = np.array([[-1.0], [1.0]])
    variance = (level.alpha * SPREAD) ** 2 + level.sigma**2
    away = x - level.alpha * means
    odds = np.exp(-(away**2) / (2 * variance) + (away**2).min(axis=0) / (2 * variance))
    each = means + level.alpha * SPREAD**2 / variance * away
    return ((odds * each).sum(axis=0) / odds.sum(axis=0)).astype(np.float32)


def distance(seed: int) -> Distance:
    """Return the distance to 400 steps, over a thousand values."""
    noise = np.random.default_rng(seed).standard_normal(1000).astype(np.float32)

    def end(sampler: str, plan: NoisePlan) -> Array:
        run = sampling.get(sampler).run(denoise, plan, lambda: noise, prediction="epsilon")
        *_, last = run
        return last.latents

    limit = end("dpmpp_2m", sampling.get("dpmpp_2m").plan(SCHEDULE, 400))

    def found(sampler: str, timesteps: tuple[float, ...]) -> float:
        ours = end(sampler, sampling.noise_plan(sampler, SCHEDULE, len(timesteps), timesteps))
        return float(np.square(ours - limit).mean())

    return found


@pytest.mark.parametrize("steps", [4, 8])
def test_searched_timesteps_beat_every_spacing_also_from_other_noise(steps: int) -> None:
    found = search_timesteps(SCHEDULE, steps, distance(0))
    held_out = distance(1)
    spaced = [held_out(s, t) for s in SOLVERS for t in spacings(SCHEDULE, s, steps).values()]
    assert held_out(found.sampler, found.timesteps) < 0.7 * min(spaced)
    assert found.distance < min(found.own.values())
    assert len(found.timesteps) == steps
    assert all(later < earlier for earlier, later in pairwise(found.timesteps))
    SCHEDULE.check(found.timesteps)


def test_the_search_is_deterministic_and_bounded() -> None:
    evaluated: list[tuple[str, tuple[float, ...]]] = []
    measure = distance(0)

    def counted(sampler: str, timesteps: tuple[float, ...]) -> float:
        evaluated.append((sampler, timesteps))
        return measure(sampler, timesteps)

    found = [search_timesteps(SCHEDULE, 5, counted, moves=20) for _ in range(2)]
    assert found[0] == found[1]
    spaced = sum(len(spacings(SCHEDULE, solver, 5)) for solver in SOLVERS)
    assert found[0].evaluations == spaced + 20 == len(evaluated) / 2


def test_without_moves_the_result_is_the_best_spacing() -> None:
    measure = distance(0)
    found = search_timesteps(SCHEDULE, 6, measure, moves=0)
    tried = {
        measure(solver, times): (solver, name, times)
        for solver in SOLVERS
        for name, times in spacings(SCHEDULE, solver, 6).items()
    }
    assert (found.sampler, found.start, found.timesteps) == tried[min(tried)]


def test_a_single_step_is_not_moved() -> None:
    found = search_timesteps(SCHEDULE, 1, distance(0))
    assert found.timesteps in [
        times for solver in SOLVERS for times in spacings(SCHEDULE, solver, 1).values()
    ]


def test_spacings() -> None:
    ten = spacings(SCHEDULE, "dpmpp_2m", 10)
    assert ten["ays_sd"] == ALIGNED["ays_sd"] and ten["ays_sdxl"] == ALIGNED["ays_sdxl"]
    plan = sampling.get("dpmpp_2m").plan(SCHEDULE, 10)
    assert ten["own"] == tuple(level.timestep for level, _ in plan.intervals)
    assert ten["trailing"][:2] == (999, 899)
    assert ten["karras"][0] == 999 and ten["karras"][-1] == 0
    nineteen = spacings(SCHEDULE, "unipc", 19)["ays_sd"]
    assert nineteen[::2] == ALIGNED["ays_sd"]  # and between them their geometric mean
    assert nineteen[1] == round((999 * 850) ** 0.5)


def test_spacings_have_no_duplicates() -> None:
    trailing = spacings(Schedule(**{**_fields(), "spacing": "trailing"}), "euler", 8)
    assert "own" in trailing and "trailing" not in trailing
    assert len(set(trailing.values())) == len(trailing)


def _fields() -> dict[str, object]:
    return {name: getattr(SCHEDULE, name) for name in SCHEDULE.__struct_fields__}


def test_a_sampler_that_takes_no_timesteps_is_refused() -> None:
    with pytest.raises(SettingsError, match="pndm takes no timesteps but its own"):
        search_timesteps(SCHEDULE, 8, distance(0), solvers=("pndm",))
    with pytest.raises(SettingsError, match="2000 steps"):
        spacings(SCHEDULE, "euler", 2000)
