"""The search for a plan: which there are, what is asked of one, and engines that follow it."""

import random
import shutil
from itertools import product
from pathlib import Path

import msgspec
import pytest

import latentforge.optimize.search.search
from latentforge.__main__ import main
from latentforge.commands.describe import changes
from latentforge.optimize.search.search import (
    PlanGate,
    SearchRequest,
    accelerate,
    check,
    summary_lines,
)
from latentforge.optimize.search.space import (
    UNACCELERATED,
    Costs,
    PlanCandidate,
    Variant,
    candidates,
    fastest,
)
from latentforge.optimize.stage.stage import optimize
from latentforge.runtime import sampling
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import psnr
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.sampling.levels import NoiseLevel

CUT = Variant(level=0)
VARIANTS = [
    UNACCELERATED,
    CUT,
    Variant(level=1),
    Variant(reduced=True),
    Variant(level=0, reduced=True),
]


def costs() -> Costs:
    """A shallow step takes less than a full one, and a guided one twice as much."""
    share = {0: 0.1, 1: 0.3, None: 1.0}
    return Costs(
        fixed=2.0,
        calls={
            (v, guided, shallow): (1 + guided)
            * (share[v.level] if shallow else 1.0 - 0.2 * v.reduced)
            for v, guided, shallow in product(VARIANTS, (False, True), (False, True))
        },
    )


# which plans there are, and which is the fastest


def test_candidates_are_all_different_and_no_longer_than_the_schedule() -> None:
    found = candidates(20, VARIANTS, guided=True)
    assert len({(c.steps, c.evaluations, c.variant) for c in found}) == len(found) > 100
    assert {c.steps for c in found} == {2, 3, 4, 5, 6, 8, 10, 12, 16, 20}
    assert {c.steps for c in candidates(7, [UNACCELERATED], guided=False)} == {2, 3, 4, 5, 6, 7}
    assert all(
        c.guided == (0, 1) and c.every == 1 for c in candidates(7, [UNACCELERATED], guided=False)
    )
    for each in found:
        assert bool(each.cached_steps) == (each.variant.level is not None)


def test_what_runs_is_what_the_runtime_makes_of_it() -> None:
    plan = PlanCandidate(steps=6, guided=(0.5, 1.0), every=2, variant=CUT)
    assert list(plan.guides) == [3, 4, 5] and plan.cached_steps == (1, 3, 5)
    # The fourth step is guided after full ones that were not: it has to be full itself.
    assert [shallow for _, shallow in plan.evaluations] == [False, True, False, False, False, True]
    assert costs().seconds(plan) == pytest.approx(2 + (1 + 0.1 + 1) + 2 * (1 + 1 + 0.1))


def test_the_fastest_that_passes_is_found_where_sparing_more_is_never_better() -> None:
    some, measured = candidates(20, VARIANTS, guided=True), costs()
    for seed in range(20):
        rng = random.Random(seed)
        weights, bar = [rng.uniform(0.5, 3) for _ in range(5)], rng.uniform(0, 40)

        def good(each: PlanCandidate, w: list[float] = weights, bar: float = bar) -> bool:
            level = 2 if each.variant.level is None else each.variant.level
            guidance = each.guided[1] - each.guided[0]
            worth = w[0] * each.steps + 10 * w[1] * guidance - 3 * w[2] * (each.every - 1)
            return worth + w[3] * level - w[4] * each.variant.reduced >= bar

        best = fastest(some, measured.seconds, good, tries=len(some))
        passing = [measured.seconds(each) for each in some if good(each)]
        assert (best is None) == (not passing)
        if best is not None:
            assert good(best) and measured.seconds(best) == min(passing)


def test_it_asks_no_more_than_it_may_and_few_of_many() -> None:
    some, asked = candidates(20, VARIANTS, guided=True), []

    def passes(each: PlanCandidate) -> bool:
        asked.append(each)
        return each.steps >= 10

    best = fastest(some, costs().seconds, passes, tries=3)
    assert len(asked) == 3 and (best is None or best.steps >= 10)
    asked.clear()
    fastest(some, costs().seconds, passes, tries=len(some))
    assert len(asked) < len(some) / 5


def test_the_interval_parts_levels_with_guidance_from_those_without() -> None:
    levels = [NoiseLevel(0.0, sigma, 0.0) for sigma in (1.0, 0.8, 0.5, 0.2)]
    for guided, interval in (
        ((0.0, 1.0), None),
        ((0.0, 0.5), ((0.8 + 0.5) / 2, 1.0)),
        ((0.25, 1.0), (0.0, 0.9)),
        ((0.25, 0.75), (0.35, 0.9)),
        ((0.0, 0.0), (0.0, 0.0)),
    ):
        plan = PlanCandidate(steps=4, guided=guided).plan("euler", (), levels)
        assert plan.guidance_interval == pytest.approx(interval)


# what is asked of one


def test_gate_of_pictures_and_points() -> None:
    assert str(PlanGate.of([])) == "psnr 20" and PlanGate.of([]).pictures.images == 4
    assert str(PlanGate.of(["images=9"])) == "psnr 20"
    gate = PlanGate.of(["colour=2", "retrieval=1.5", "ssim=0.9"])
    assert str(gate) == "ssim 0.9, colour within 2 points, retrieval within 1.5 points"
    assert gate.pictures.images == 128
    fine = {"ssim": 0.95, "colour": 0.96, "colour_exact": 0.98}
    shares = {"retrieval": 0.88, "retrieval_exact": 0.9}
    assert list(gate.failures({**fine, **shares})) == [
        "image: retrieval loses 2 points and may lose 1.5"
    ]
    assert list(gate.failures({**fine, **shares, "retrieval": 0.93})) == []
    assert len(list(gate.failures({**fine, **shares, "ssim": 0.8, "colour": 0.9}))) == 3


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (["psnrr=3"], "no gate 'psnrr=3'.*colour and retrieval"),
        (["colour=much"], "colour is how many points of 0 to 100 may be lost, not much"),
        (["retrieval=101"], "may be lost, not 101"),
        (["max_relative_error=1"], "judge a plan by its pictures"),
        (["perceptual=1"], "perceptual needs a network"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(gate: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check(SearchRequest(gate=gate), "demo", "cpu")


def test_what_cannot_be_judged_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="gate colour is of the demo's pictures"):
        check(SearchRequest(gate=["colour=2"]), "org/model", "cpu")
    for folder in (None, tmp_path):
        with pytest.raises(SettingsError, match="gate retrieval needs --retrieval"):
            check(SearchRequest(gate=["retrieval=2"], retrieval=folder), "demo", "cpu")
    with pytest.raises(SettingsError, match="cannot read prompts"):
        check(SearchRequest(prompts=tmp_path / "none.txt"), "org/model", "cpu")
    with pytest.raises(SettingsError, match="repeats of a search is a number from 1"):
        SearchRequest(repeats=0)


# engines that follow it


@pytest.fixture(scope="module")
def planned(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny engines with a plan that is all but free to do what it likes."""
    directory = few_steps(tiny_engines, tmp_path_factory.mktemp("fast") / "engines")
    accelerate(directory, SearchRequest(gate=["psnr=5", "images=2"], effort=3, repeats=3))
    return directory


def few_steps(engines: Path, directory: Path, side: int = 32) -> Path:
    """A copy of engines whose own schedule takes no time, for images of so many pixels a side."""
    shutil.copytree(engines, directory)
    manifest = Manifest.read(directory)
    defaults = msgspec.structs.replace(
        manifest.defaults, sampler="ddim", steps=12, height=side, width=side
    )
    msgspec.structs.replace(manifest, defaults=defaults).write(directory)
    return directory


def test_the_plan_is_in_the_manifest_with_what_it_was_measured_to_be(planned: Path) -> None:
    manifest = Manifest.read(planned)
    plan, stage = manifest.acceleration, manifest.history[-1]
    assert plan is not None and plan.steps < manifest.defaults.steps
    assert plan.measured["speedup"] > 1.1 and plan.measured["psnr"] >= 5
    assert plan.measured["speedup_min"] <= plan.measured["speedup"]
    assert plan.measured["speedup"] <= plan.measured["speedup_max"]
    assert plan.measured["images"] == 2
    assert stage.name == "search" and 1 <= len(stage.options["plans"]) <= 3
    assert any(not tried["failures"] for tried in stage.options["plans"])
    assert any(found["steps"] == plan.steps for found in stage.options["timesteps"])
    lines = list(summary_lines(manifest))
    assert stage.options["plan"] in lines[0] and "class B" in lines[1]
    (line,) = changes(stage)
    assert line.endswith(f"taken: {stage.options['plan']}")


def test_only_what_the_plan_takes_is_left(planned: Path) -> None:
    manifest = Manifest.read(planned)
    named = {entry.file for entry in manifest.files} | {"manifest.json"}
    found = {p.relative_to(planned).as_posix() for p in planned.rglob("*") if p.is_file()}
    assert found == named
    assert manifest.acceleration is not None
    assert bool(manifest.acceleration.cached_steps) == ("denoiser_cached" in manifest.components)


def test_requests_follow_the_plan_and_exact_ones_do_not(planned: Path, tiny_engines: Path) -> None:
    with load(planned) as pipeline, load(tiny_engines) as original:
        plan = pipeline.manifest.acceleration
        assert plan is not None
        ours = pipeline("red apple", seed=5)
        assert (ours.settings.sampler, ours.settings.steps) == (plan.sampler, plan.steps)
        again = pipeline("red apple", seed=5, unaccelerated=True, **plan.request)
        assert (ours.latents == again.latents).all()
        exact = pipeline("red apple", seed=5, unaccelerated=True)
        theirs = original("red apple", seed=5, sampler="ddim", steps=12)
        assert exact.settings.steps == theirs.settings.steps != plan.steps
        assert psnr(exact.latents, theirs.latents) > 80


def test_the_timesteps_of_the_plan_are_its_samplers(planned: Path) -> None:
    manifest = Manifest.read(planned)
    plan = manifest.acceleration
    assert plan is not None and len(plan.timesteps) == plan.steps
    made = sampling.noise_plan(plan.sampler, manifest.schedule, plan.steps, plan.timesteps)
    assert len(made.intervals) == plan.steps


def test_engines_are_cut_for_a_plan_with_shallow_steps(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = few_steps(tiny_engines, tmp_path / "engines")
    only = PlanCandidate(steps=6, guided=(0.0, 0.5), every=2, variant=CUT)
    monkeypatch.setattr(latentforge.optimize.search.search, "candidates", lambda *_, **__: [only])
    manifest = accelerate(
        directory, SearchRequest(gate=["psnr=1", "images=1"], effort=1, repeats=3)
    )
    assert manifest.acceleration is not None and manifest.acceleration.cached_steps == (1, 3, 5)
    assert "cached_feature" in manifest.components["denoiser"].outputs
    assert [stage.name for stage in manifest.history] == ["export", "cached-step", "search"]
    assert Manifest.read(directory) == manifest  # hashes and all
    named = {entry.file for entry in manifest.files} | {"manifest.json"}
    assert {p.relative_to(directory).as_posix() for p in directory.rglob("*.*")} == named
    with load(directory) as pipeline, load(tiny_engines) as original:
        calls = pipeline("red apple", seed=5).timings.stages
        assert (len(calls["denoiser"]), len(calls["denoiser_cached"])) == (3, 3)
        request = {"seed": 5, "sampler": "ddim", "steps": 12}
        exact = pipeline("red apple", unaccelerated=True, **request)
        assert psnr(exact.latents, original("red apple", **request).latents) > 80


@pytest.mark.slow
def test_large_images_may_have_less_attention(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized = tmp_path / "optimized"
    optimize(tiny_engines, optimized, gate=["images=1"], request={"steps": 1}, repeats=0)
    directory = few_steps(optimized, tmp_path / "engines", side=128)
    reduced = PlanCandidate(steps=2, variant=Variant(reduced=True))
    monkeypatch.setattr(
        latentforge.optimize.search.search, "candidates", lambda *_, **__: [reduced]
    )
    manifest = accelerate(
        directory, SearchRequest(gate=["psnr=1", "images=1"], effort=1, repeats=1)
    )
    assert manifest.acceleration is not None and manifest.acceleration.variant == "denoiser_reduced"
    assert "denoiser_cached" not in manifest.components
    with load(directory) as pipeline:
        assert pipeline("red apple", seed=5).images[0].size == (128, 128)
        assert "denoiser_reduced" in pipeline.engines


def test_where_nothing_passes_engines_stay_exact(tiny_engines: Path, tmp_path: Path) -> None:
    directory = few_steps(tiny_engines, tmp_path / "engines")
    manifest = accelerate(
        directory, SearchRequest(gate=["psnr=99", "images=1"], effort=2, repeats=1)
    )
    assert manifest.acceleration is None
    assert manifest.components == Manifest.read(tiny_engines).components
    assert [tried["failures"][0][:5] for tried in manifest.history[-1].options["plans"]] == [
        "image"
    ] * 2
    assert list(summary_lines(manifest)) == [
        "no plan of 2 that were judged passes psnr 99: the engines stay exact"
    ]
    assert not (directory / "plans").exists()


# the command


def test_bad_input_costs_no_export(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(tiny_checkpoint), str(tmp_path / "out")
    for arguments, message in (
        (["--fast", "--gate", "retrieval=2"], "gate retrieval is of the demo's pictures"),
        (["--fast", "--repeats", "0"], "repeats of a search is a number from 1 to 1000"),
        (["--effort", "3"], "--effort is for the search of a plan: give --fast"),
        (["--fast", "--layout", "optimum"], "--layout optimum keeps graphs as optimum knows them"),
    ):
        assert main(["build", source, target, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_will_be_searched(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(tiny_checkpoint), str(tmp_path / "out"), "--fast", "--dry-run"]
    assert main([*command, "--gate", "ssim=0.8", "--effort", "7"]) == 0
    said = capsys.readouterr().out
    assert "judge up to 7 plans by 4 images each, and take the fastest with ssim 0.8" in said


def test_build_fast(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    command = ["build", str(tiny_checkpoint), str(target), "--fast", "--effort", "2"]
    assert main([*command, "--gate", "psnr=5", "--gate", "images=1", "--repeats", "1"]) == 0
    manifest, said = Manifest.read(target), capsys.readouterr().out
    assert manifest.history[1].name == "optimize" and manifest.history[-1].name == "search"
    assert manifest.history[1].options["settings"]["gate"]["psnr"] == 40  # the recipe's own
    assert "recipe fp32 for cpu" in said and "2 were judged by psnr 5" in said
    assert (
        main(["run", str(target), "red apple", "-o", str(tmp_path / "a.png"), "--seed", "1"]) == 0
    )
