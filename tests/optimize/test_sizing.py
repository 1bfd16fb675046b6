"""Budgets of optimizations: what is reduced, in which order, what is kept, and where it is said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentforge.__main__ import main
from latentforge.commands.arguments import parse_duration
from latentforge.commands.describe import describe
from latentforge.optimize.stage.durations import (
    ImageCost,
    RunSize,
    Workload,
    durations,
    measure_cost,
)
from latentforge.optimize.stage.job import OptimizeJob, plan
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.stage.sizing import fit
from latentforge.optimize.stage.stage import optimize
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.progress import Progress

SLOW = ImageCost(load=10, encode=1, step=20, decode=10, layers=100)
"""Seconds of Stable Diffusion 1.5 on two slow cores."""

MakeJob = Callable[..., OptimizeJob]


@pytest.fixture
def make_job(tiny_engines: Path) -> MakeJob:
    def job(**options: Any) -> OptimizeJob:
        return plan(tiny_engines, OptimizeRequest(**{"budget": 900.0, **options}))

    return job


def total(job: OptimizeJob) -> float:
    return sum(durations(Workload.of(job), SLOW).values())


def test_ample_time_reduces_nothing(make_job: MakeJob) -> None:
    for recipe in ("fp32", "int8", "auto", "small", "sparse"):
        wanted = make_job(recipe=recipe)
        job = fit(wanted, replace(SLOW, load=0, encode=0, step=0.001, decode=0), 900)
        assert job.sizing is not None and job.sizing.reduced == {}
        assert (job.recipes, job.request) == (wanted.recipes, wanted.request)


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int8-weights"])
@pytest.mark.parametrize("budget", [1200, 1800, 3600, 4 * 3600])
def test_a_budget_is_kept_and_used(make_job: MakeJob, recipe: str, budget: float) -> None:
    wanted = make_job(recipe=recipe)
    job = fit(wanted, SLOW, budget)
    assert total(job) <= budget or RunSize.of(job).steps == 4
    if total(wanted) > budget:
        assert total(job) >= 0.35 * budget  # the steps between two sizes are not too coarse
        assert job.sizing is not None and job.sizing.reduced


def test_the_order_of_reduction(make_job: MakeJob) -> None:
    """Timing first, then images, calibration, pairs, and the steps of all last."""
    wanted, reduced = make_job(recipe="int8"), []
    for budget in (*range(60_000, 3000, -700), *range(3000, 100, -25)):
        job = fit(wanted, SLOW, budget)
        assert job.sizing is not None
        reduced += [name for name in job.sizing.reduced if name not in reduced]
    assert reduced == ["timed_steps", "images", "prompts", "samples", "repeats", "steps"]
    size = RunSize.of(job)
    assert (size.images, size.prompts, size.steps, size.samples, size.repeats) == (1, 1, 4, 2, 1)


def test_the_sensitivity_of_layers_is_given_up_last(make_job: MakeJob) -> None:
    job = fit(make_job(recipe="auto"), SLOW, 900)
    assert job.sizing is not None and job.sizing.reduced["sensitivity_steps"] == (4, 0)
    assert job.recipes["int8"].sensitivity is None
    job = fit(make_job(recipe="auto"), SLOW, 4 * 3600)
    assert job.sizing is not None and job.sizing.reduced["sensitivity_steps"] == (4, 1)


def test_what_is_given_is_kept(make_job: MakeJob) -> None:
    given = make_job(
        recipe="int8", gate=("images=3",), settings={"steps": 7}, repeats=2, calibration_prompts=5
    )
    job = fit(given, SLOW, 60)
    size = RunSize.of(job)
    assert (size.images, size.steps, size.repeats, size.prompts) == (3, 7, 2, 5)
    assert size.timed_steps == 7 and size.samples == 2
    assert (
        job.sizing is not None and "numbers that were given are kept" in [*job.sizing.lines()][-1]
    )


def test_the_floor_exceeds_a_tiny_budget_and_says_so(make_job: MakeJob) -> None:
    job = fit(make_job(), SLOW, 5)
    size = RunSize.of(job)
    assert (size.images, size.steps, size.repeats, size.timed_steps) == (1, 4, 1, 2)
    assert job.sizing is not None
    *_, last = job.sizing.lines()
    assert last.startswith("that is over the budget of 5s")


def test_other_stages_take_their_part(make_job: MakeJob) -> None:
    alone, after = fit(make_job(), SLOW, 1800), fit(make_job(reserved=600.0), SLOW, 1800)
    assert total(after) <= 1200 < total(alone)


def test_few_steps_by_default_stay(make_job: MakeJob, tiny_engines: Path) -> None:
    """A distilled model of two steps keeps them."""
    import msgspec

    job = make_job()
    defaults = msgspec.structs.replace(job.manifest.defaults, steps=2)
    job = replace(job, manifest=msgspec.structs.replace(job.manifest, defaults=defaults))
    assert RunSize.of(fit(job, SLOW, 5)).steps == 2


def test_one_step_is_measured(make_job: MakeJob) -> None:
    with Progress(1) as progress:
        cost = measure_cost(make_job(), progress)
    assert min(cost.load, cost.encode, cost.step, cost.decode) > 0 and cost.layers == 0


def test_the_history_and_inspect_say_what_was_reduced(
    tiny_engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = OptimizeRequest(budget=0.001, quiet=False)
    manifest = optimize(tiny_engines, tmp_path / "out", request)
    options = manifest.history[-1].options
    assert options["steps"] == 4 and manifest.history[-1].measured["image"]["images"] == 1
    sizing = options["sizing"]
    assert sizing["reduced"]["images"] == [4, 1] and sizing["budget"] == 0.001
    assert sizing["predicted"].keys() == {"references", "rewriting", "gate", "timing"}
    assert manifest == Manifest.read(tmp_path / "out")
    assert "reduced for a budget of 0s: timed_steps 50 -> 2, images 4 -> 1" in describe(manifest)
    errors = capsys.readouterr().err
    assert "reduced for the budget of 0s: steps of timed images" in errors
    assert "over the budget" in errors


def test_without_a_budget_nothing_is_measured(tiny_engines: Path, tmp_path: Path) -> None:
    request = OptimizeRequest(gate=("images=1",), settings={"steps": 1}, repeats=0)
    assert "sizing" not in optimize(tiny_engines, tmp_path / "out", request).history[-1].options


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("1.5h", 5400), ("none", None)]
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "15", "m", "-5m", "1e9s", "nanm", "0s", "5 m", "9" * 5000 + "h"]
)
def test_wrong_durations(
    text: str, tiny_engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["optimize", str(tiny_engines), str(tmp_path / "out"), f"--budget={text}"]
    assert main(arguments) == 2
    assert "budget" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), 1e300])
def test_wrong_budgets(budget: float) -> None:
    with pytest.raises(SettingsError, match="budget is a number of seconds"):
        OptimizeRequest(budget=budget)
