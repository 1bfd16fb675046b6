"""Knapsack, evolution, greedy removal and baselines, on sites with made-up costs and errors."""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

from diffusers import UNet2DConditionModel

from latentforge.export.models.searched_structure import (
    Choice,
    SearchedStructure,
    Site,
    list_sites,
)
from latentforge.runtime.errors import CheckpointError
from latentforge.train.search.baselines import (
    list_baselines,
    published_structures,
    random_structure,
    uniform_structure,
)
from latentforge.train.search.evolution import EvolutionSettings, best_within, evolve
from latentforge.train.search.greedy import greedy_path
from latentforge.train.search.knapsack import pareto_front
from latentforge.train.search.problem import Cost, Problem
from latentforge.train.search.variants import WHOLE

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SITES = (
    Site(name="down_blocks.0.resnets.0", kind="resnet", choices=("keep", "half")),
    Site(
        name=BLOCK,
        kind="transformer_block",
        choices=("keep", "half", "no_feed_forward", "drop"),
    ),
    Site(name="down_blocks.1.resnets.0", kind="resnet", choices=("keep", "half", "drop")),
    Site(name="mid_block.resnets.0", kind="resnet", choices=("keep", "drop")),
    Site(
        name="down_blocks.1",
        kind="stage",
        choices=("keep", "drop"),
        covers=("down_blocks.1.resnets.0", "mid_block.resnets.0"),
    ),
)
FACTORS = {"half": 0.5, "no_self_attention": 0.3, "no_feed_forward": 0.4, "cross_attention": 0.7}

Error = Callable[[SearchedStructure], float]


def unet_config(**changes: Any) -> dict[str, Any]:
    """Configuration of Stable Diffusion 1.5's UNet, with changes."""
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    values = {name: p.default for name, p in parameters.items() if name != "self"}
    return {**values, "sample_size": 64, "cross_attention_dim": 768, **changes}


def made_up(sites: tuple[Site, ...], seed: int = 0) -> tuple[Problem, Error]:
    """Return a problem of half the cost, and errors that are sums of scores."""
    random = np.random.default_rng(seed)
    saved: dict[tuple[str, Choice], float] = {}
    scores: dict[tuple[str, Choice], float] = {}
    for site in sites:
        size, weight = random.uniform(0.2, 1.0), random.lognormal(0.0, 1.0)
        for choice in site.choices[1:]:
            part = FACTORS.get(choice, 1.0) * random.uniform(0.9, 1.1)
            saved[site.name, choice], scores[site.name, choice] = size * part, weight * part**2
    whole = 1.5 * sum(saved[s.name, s.choices[-1]] for s in sites if s.kind != "stage")

    def total(structure: SearchedStructure) -> float:
        return round(whole - sum(saved[item] for item in structure.choices.items()), 9)

    def error(structure: SearchedStructure) -> float:
        return round(sum(scores[item] for item in structure.choices.items()), 9)

    cost = Cost(whole=whole, total=total, saved=lambda *item: saved[item])
    problem = Problem(sites=sites, cost=cost, limit=0.6 * whole, score=lambda *item: scores[item])
    return problem, error


def valid_structures(sites: tuple[Site, ...]) -> list[SearchedStructure]:
    found = dict[SearchedStructure, None]()
    for choices in itertools.product(*(site.choices for site in sites)):
        named = dict(zip((site.name for site in sites), choices, strict=True))
        structure = SearchedStructure.of(named, sites)
        try:
            structure.check(sites)
        except CheckpointError:
            continue
        found[structure] = None
    return list(found)


@pytest.mark.parametrize("seed", range(8))
def test_the_front_is_that_of_all_structures(seed: int) -> None:
    problem, error = made_up(SITES, seed)
    cost = problem.cost
    front = pareto_front(SITES, cost.saved, problem.score)
    everything = [(cost.total(s), error(s)) for s in valid_structures(SITES)]
    best = {
        (c, e)
        for c, e in everything
        if not any(o <= c and p <= e and (o, p) != (c, e) for o, p in everything)
    }
    found = {(cost.total(p.structure), error(p.structure)) for p in front}
    assert found == best
    assert front[0].structure.choices == {}
    for point in front:
        assert cost.total(point.structure) == pytest.approx(cost.whole - point.saved)


def test_cross_attention_remains_however_cheap_it_is_to_drop() -> None:
    def score(site: str, choice: Choice) -> float:
        return 0.0 if (site, choice) == (BLOCK, "drop") else 1.0

    front = pareto_front(SITES, lambda *_: 1.0, score)
    assert all(point.structure.choice(BLOCK) != "drop" for point in front)


def test_a_choice_that_saves_nothing_is_not_taken() -> None:
    front = pareto_front(SITES, lambda site, _: -1.0 if "mid" in site else 1.0, lambda *_: 0.0)
    assert all(point.structure.choice("mid_block.resnets.0") == "keep" for point in front)


def best(problem: Problem) -> SearchedStructure:
    """Return the structure of the least sum that fits."""
    front = pareto_front(problem.sites, problem.cost.saved, problem.score)
    return min((p for p in front if problem.fits(p.structure)), key=lambda p: p.error).structure


def with_interaction(structure: SearchedStructure, sums: Error) -> Error:
    """Return errors that are higher where two of a structure's dropped sites are dropped both."""
    pair = [name for name, choice in structure.choices.items() if choice == "drop"][:2]

    def error(other: SearchedStructure) -> float:
        return sums(other) * (3 if all(other.choice(name) == "drop" for name in pair) else 1)

    return error


SMALL = EvolutionSettings(population=8, generations=4, others=2)


def test_evolution_repairs_what_does_not_add_up() -> None:
    problem, sums = made_up(list_sites(unet_config()))
    first = best(problem)
    error = with_interaction(first, sums)
    random = np.random.default_rng(0)
    judged = evolve(problem, {first: error(first)}, error, random, SMALL)
    assert 1 < len(judged) <= 1 + SMALL.evaluations
    found = best_within(problem, judged)
    assert judged[found[0]] < 0.75 * error(first)
    assert set(found) == set(judged) and judged[found[0]] == min(judged.values())


@pytest.mark.parametrize("ratio", [2.0, 2.5])
def test_evolution_repairs_the_front_beyond_the_limit(ratio: float) -> None:
    problem, sums = made_up(list_sites(unet_config()))
    other = replace(problem, limit=problem.cost.whole / ratio)
    first = [best(problem), best(other)]
    error = with_interaction(first[1], sums)
    settings = EvolutionSettings(population=16, generations=6)
    random = np.random.default_rng(1)
    judged = evolve(problem, {s: error(s) for s in first}, error, random, settings)
    assert judged[best_within(other, judged)[0]] < 0.9 * error(first[1])


def test_evolution_ends_when_time_is_up() -> None:
    problem, error = made_up(list_sites(unet_config()))
    first, random = {WHOLE: 0.0}, np.random.default_rng(0)
    assert evolve(problem, first, error, random, EvolutionSettings(), lambda: False) == first


def test_baselines_are_different_and_the_best_of_random_ones() -> None:
    problem, error = made_up(list_sites(unet_config()))
    judged: dict[SearchedStructure, float] = {}

    def recorded(structure: SearchedStructure) -> float:
        return judged.setdefault(structure, error(structure))

    baselines = list_baselines(problem, recorded, np.random.default_rng(0))
    *_, uniform, random = baselines
    assert (uniform.name, random.name) == ("uniform pruning", "best of 8 random")
    assert len(judged) == 8 and judged[random.structure] == min(judged.values())
    assert len({baseline.structure for baseline in baselines}) == len(baselines)


def test_greedy_removal_ends_where_it_fits() -> None:
    problem, error = made_up(list_sites(unet_config()))
    *before, last = greedy_path(problem, error, lambda: True)
    assert problem.fits(last) and not any(map(problem.fits, before))
    random = random_structure(problem, np.random.default_rng(0))
    assert random is not None and error(last) < error(random)


def test_uniform_and_random_pruning_fit() -> None:
    problem, _ = made_up(list_sites(unet_config()))
    uniform = uniform_structure(problem)
    assert uniform is not None and problem.fits(uniform) and "half" in uniform.choices.values()
    for seed in range(3):
        structure = random_structure(problem, np.random.default_rng(seed))
        assert structure is not None and problem.fits(structure)


def test_published_structures_of_stable_diffusion() -> None:
    sites = list_sites(unet_config())
    published = {b.name: b.structure.to_config(sites) for b in published_structures(sites)}
    base, tiny = published["BK-SDM base"], published["BK-SDM tiny"]
    assert base["down_blocks_num_resnets"] == [1, 1, 1, 1]
    assert base["up_blocks_num_attentions"] == [0, 2, 2, 2]
    assert base["mid_num_resnets"] == 2 and published["BK-SDM small"]["mid_num_resnets"] == 0
    assert tiny["down_blocks_num_resnets"] == [1, 1, 1, 0]
    assert tiny["up_blocks_num_resnets"] == [0, 2, 2, 2]
    first, second = published["DeciDiffusion 1.0"], published["DeciDiffusion 2.0"]
    assert first["down_blocks_num_attentions"] == [0, 1, 2, 0]
    assert first["up_blocks_num_attentions"] == [0, 3, 3, 0]
    assert first["mid_num_resnets"] == 2 and second["mid_num_resnets"] == 0
    assert second["down_blocks_num_resnets"] == [2, 2, 1, 0]


def test_structures_that_are_the_teacher_itself_are_no_baselines() -> None:
    sites = list_sites(
        unet_config(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D", *("UpBlock2D",) * 2),
            layers_per_block=1,
        )
    )
    names = [baseline.name for baseline in published_structures(sites)]
    assert "DeciDiffusion 1.0" not in names and "BK-SDM base" in names
