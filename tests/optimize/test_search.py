"""The search for a plan: the candidates, the gate, and engines with a plan."""

import random
import shutil
from collections.abc import Callable
from itertools import count, product
from pathlib import Path

import msgspec
import pytest

from latentforge.__main__ import main
from latentforge.build import with_demo_metrics
from latentforge.commands.describe import stage_lines
from latentforge.measure.quality.inputs import Gallery
from latentforge.measure.results import ConfidenceInterval
from latentforge.optimize.search import search as SEARCH
from latentforge.optimize.search.image_set import single_image_requests
from latentforge.optimize.search.plan_gate import PlanGate
from latentforge.optimize.search.request import SearchRequest, check_search
from latentforge.optimize.search.search import accelerate, is_faster, summary_lines
from latentforge.optimize.search.space import (
    UNACCELERATED,
    Costs,
    EvaluationKind,
    PlanCandidate,
    Variant,
    fastest_passing,
    list_candidates,
)
from latentforge.optimize.stage.request import OptimizeRequest
from latentforge.optimize.stage.stage import optimize
from latentforge.runtime import sampling
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import psnr
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.sampling.levels import NoiseLevel

SPLIT = Variant(level=0)
VARIANTS = [
    UNACCELERATED,
    SPLIT,
    Variant(level=1),
    Variant(reduced=True),
    Variant(level=0, reduced=True),
]


def costs() -> Costs:
    """Seconds: a cached step takes less than a full one, and a guided step twice as much."""
    share = {0: 0.1, 1: 0.3, None: 1.0}
    return Costs(
        fixed=2.0,
        evaluations={
            (v, EvaluationKind(guided, cached)): (1 + guided)
            * (share[v.level] if cached else 1.0 - 0.2 * v.reduced)
            for v, guided, cached in product(VARIANTS, (False, True), (False, True))
        },
    )


# the candidates, and the fastest of them


def test_candidates_are_different_and_no_longer_than_the_schedule() -> None:
    candidates = list_candidates(20, VARIANTS, guided=True)
    assert len({(c.steps, c.evaluations, c.variant) for c in candidates}) == len(candidates) > 100
    assert {c.steps for c in candidates} == {2, 3, 4, 5, 6, 8, 10, 12, 16, 20}
    assert {c.steps for c in list_candidates(7, [UNACCELERATED], guided=False)} == {
        2,
        3,
        4,
        5,
        6,
        7,
    }
    assert all(
        c.guided == (0, 1) and c.cache_interval == 1
        for c in list_candidates(7, [UNACCELERATED], guided=False)
    )
    for each in candidates:
        assert bool(each.cached_steps) == (each.variant.level is not None)


def test_evaluations_are_those_of_the_runtime() -> None:
    plan = PlanCandidate(steps=6, guided=(0.5, 1.0), cache_interval=2, variant=SPLIT)
    assert list(plan.guided_steps) == [3, 4, 5] and plan.cached_steps == (1, 3, 5)
    # The fourth step is guided after full ones that were not: it has to be full itself.
    assert [cached for _, cached in plan.evaluations] == [False, True, False, False, False, True]
    assert costs().seconds(plan) == pytest.approx(2 + (1 + 0.1 + 1) + 2 * (1 + 1 + 0.1))


def test_the_fastest_passing_is_found_if_saving_more_is_never_better() -> None:
    candidates, measured = list_candidates(20, VARIANTS, guided=True), costs()
    for seed in range(20):
        rng = random.Random(seed)
        weights, bar = [rng.uniform(0.5, 3) for _ in range(5)], rng.uniform(0, 40)

        def good(each: PlanCandidate, w: list[float] = weights, bar: float = bar) -> bool:
            level = 2 if each.variant.level is None else each.variant.level
            guidance = each.guided[1] - each.guided[0]
            worth = w[0] * each.steps + 10 * w[1] * guidance - 3 * w[2] * (each.cache_interval - 1)
            return worth + w[3] * level - w[4] * each.variant.reduced >= bar

        best = fastest_passing(candidates, measured.seconds, good, tries=len(candidates))
        passing = [measured.seconds(each) for each in candidates if good(each)]
        assert (best is None) == (not passing)
        if best is not None:
            assert good(best) and measured.seconds(best) == min(passing)


def test_few_candidates_are_judged() -> None:
    candidates, judged = list_candidates(20, VARIANTS, guided=True), []

    def passes(each: PlanCandidate) -> bool:
        judged.append(each)
        return each.steps >= 10

    best = fastest_passing(candidates, costs().seconds, passes, tries=3)
    assert len(judged) == 3 and (best is None or best.steps >= 10)
    judged.clear()
    fastest_passing(candidates, costs().seconds, passes, tries=len(candidates))
    assert len(judged) < len(candidates) / 5


def test_the_guidance_interval_separates_levels_with_and_without_guidance() -> None:
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


# the gate


NAMES = ("colour", "retrieval")


def test_gate_of_images_and_accuracies() -> None:
    assert str(PlanGate.parse([])) == "psnr 20" and PlanGate.parse([]).images.images == 4
    assert str(PlanGate.parse(["images=9"])) == "psnr 20"
    gate = PlanGate.parse(["colour=2", "retrieval=1.5", "ssim=0.9"], accuracies=NAMES)
    assert str(gate) == "ssim 0.9, colour within 2 points, retrieval within 1.5 points"
    assert gate.images.images == 128
    good = {"ssim": 0.95, "colour": 0.96, "colour_unaccelerated": 0.98}
    accuracies = {"retrieval": 0.88, "retrieval_unaccelerated": 0.9}
    assert list(gate.failures({**good, **accuracies})) == [
        "image: retrieval loses 2 points and may lose 1.5"
    ]
    assert list(gate.failures({**good, **accuracies, "retrieval": 0.93})) == []
    assert len(list(gate.failures({**good, **accuracies, "ssim": 0.8, "colour": 0.9}))) == 3


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (("psnrr=3",), "no gate 'psnrr=3'.*for this checkpoint also colour and retrieval"),
        (("colour=much",), "colour is the loss allowed, in percentage points.*not much"),
        (("retrieval=101",), "from 0 to 100, not 101"),
        (("max_relative_error=1",), "compares engines, not images"),
        (("perceptual=1",), "perceptual needs a network"),
    ],
)
def test_invalid_gates_are_refused(gate: tuple[str, ...], message: str) -> None:
    accuracies = dict.fromkeys(NAMES, lambda images, prompts: len(images))
    with pytest.raises(SettingsError, match=message):
        check_search(SearchRequest(gate=gate, accuracies=accuracies), "cpu")


def test_an_accuracy_that_was_not_supplied_is_no_gate() -> None:
    with pytest.raises(SettingsError, match="no gate 'colour=2'"):
        check_search(SearchRequest(gate=("colour=2",)), "cpu")


def test_a_search_that_cannot_be_done_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no network nowhere.onnx"):
        check_search(SearchRequest(network="nowhere.onnx"), "cpu")
    for wrong in (0, 5):
        with pytest.raises(SettingsError, match=f"repeats of a search is .* from 6 .*not {wrong}"):
            SearchRequest(repeats=wrong)


def test_accuracies_are_of_the_demo_with_its_prompts(tmp_path: Path) -> None:
    colour, retrieval = (SearchRequest(gate=(f"{name}=2",)) for name in NAMES)
    with pytest.raises(SettingsError, match="gate colour is for images of the demo checkpoint"):
        with_demo_metrics("org/model", colour, None)
    with pytest.raises(SettingsError, match="gate retrieval needs --retrieval"):
        with_demo_metrics("demo", retrieval, None)
    with pytest.raises(SettingsError, match="does not hold the demo's training images"):
        with_demo_metrics("demo", retrieval, tmp_path)
    other = SearchRequest(gate=("colour=2",), prompts=("a red bus",))
    with pytest.raises(SettingsError, match="gate colour needs prompts of the demo"):
        with_demo_metrics("demo", other, None)
    complete = with_demo_metrics("demo", colour, None)
    assert complete.accuracies.keys() == {"colour"} and " on a " in complete.prompts[0]
    assert str(complete.plan_gate) == "colour within 2 points"
    assert with_demo_metrics("org/model", SearchRequest(), None) == SearchRequest()


def test_sets_of_images_share_no_seed(tiny_engines: Path) -> None:
    defaults = Manifest.read(tiny_engines, hashes=False).defaults
    requests = single_image_requests(defaults, ("a", "b"), 6)
    assert [request.seed for request in requests] == [0, 1, 2, 3, 4, 5]
    assert [request.prompts for request in requests] == [("a",), ("b",)] * 3
    assert all(request.unaccelerated for request in requests)


def test_faster_is_what_the_lower_bound_says() -> None:
    def interval(low: float | None, level: float | None) -> ConfidenceInterval:
        return ConfidenceInterval(value=1.5, low=low, high=low and 2.0, level=level)

    assert is_faster(interval(1.01, 0.96))
    assert not is_faster(interval(0.99, 0.96))  # though its median is above 1
    assert not is_faster(interval(1.2, 0.75))  # of three pairs
    assert not is_faster(interval(None, None))


# engines with a plan


@pytest.fixture(scope="module")
def planned(small_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines with a plan behind a gate that almost any plan passes."""
    directory = few_steps(small_engines, tmp_path_factory.mktemp("fast") / "engines")
    accelerate(directory, SearchRequest(gate=("psnr=5", "images=2"), effort=3))
    return directory


def few_steps(engines: Path, directory: Path, side: int = 32) -> Path:
    """Copy engines, with a short default schedule and a default side in pixels."""
    shutil.copytree(engines, directory)
    manifest = Manifest.read(directory)
    defaults = msgspec.structs.replace(
        manifest.defaults, sampler="ddim", steps=12, height=side, width=side
    )
    msgspec.structs.replace(manifest, defaults=defaults).write(directory)
    return directory


def test_the_manifest_has_the_plan_and_its_figures(planned: Path) -> None:
    manifest = Manifest.read(planned)
    plan, stage = manifest.acceleration, manifest.history[-1]
    assert plan is not None and plan.steps < manifest.defaults.steps
    assert plan.measured["speedup"] > 1.1 and plan.measured["psnr"] >= 5
    assert 1 < plan.measured["speedup_low"] <= plan.measured["speedup"]
    assert plan.measured["speedup"] <= plan.measured["speedup_high"]
    assert plan.measured["speedup_level"] == pytest.approx(0.9688, abs=1e-4)
    assert plan.measured["images"] == 2
    assert stage.name == "search" and 1 <= len(stage.options["plans"]) <= 3
    assert any(not judged["failures"] for judged in stage.options["plans"])
    assert stage.options["confirmation"][-1]["plan"] == stage.options["plan"]
    assert stage.options["confirmation"][-1]["failures"] == []
    reported = stage.options["report"]
    assert plan.measured["psnr"] == reported["psnr"] != stage.options["confirmation"][-1]["psnr"]
    assert stage.options["speedup"]["level"] == 1 - 2**-5
    assert any(found["steps"] == plan.steps for found in stage.options["timesteps"])
    lines = list(summary_lines(manifest))
    assert stage.options["plan"] in lines[0] and "class B" in lines[1]
    (line,) = stage_lines(stage)
    assert line.endswith(f"selected: {stage.options['plan']}")


def test_only_the_components_of_the_plan_are_kept(planned: Path) -> None:
    manifest = Manifest.read(planned)
    named = {entry.file for entry in manifest.files} | {"manifest.json"}
    found = {p.relative_to(planned).as_posix() for p in planned.rglob("*") if p.is_file()}
    assert found == named
    assert manifest.acceleration is not None
    assert bool(manifest.acceleration.cached_steps) == ("denoiser_cached" in manifest.components)


def test_requests_follow_the_plan_unless_unaccelerated(planned: Path, small_engines: Path) -> None:
    with load(planned) as pipeline, load(small_engines) as original:
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


def test_the_sampler_accepts_the_timesteps_of_the_plan(planned: Path) -> None:
    manifest = Manifest.read(planned)
    plan = manifest.acceleration
    assert plan is not None and len(plan.timesteps) == plan.steps
    made = sampling.noise_plan(plan.sampler, manifest.schedule, plan.steps, plan.timesteps)
    assert len(made.intervals) == plan.steps


def test_the_denoiser_is_split_for_a_plan_with_cached_steps(
    small_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = few_steps(small_engines, tmp_path / "engines")
    only = PlanCandidate(steps=6, guided=(0.0, 0.5), cache_interval=2, variant=SPLIT)
    monkeypatch.setattr(SEARCH, "list_candidates", lambda *_, **__: [only])
    manifest = accelerate(directory, SearchRequest(gate=("psnr=1", "images=1"), effort=1))
    assert manifest.acceleration is not None and manifest.acceleration.cached_steps == (1, 3, 5)
    assert "cached_feature" in manifest.components["denoiser"].outputs
    assert [stage.name for stage in manifest.history] == ["export", "cached-step", "search"]
    assert Manifest.read(directory) == manifest  # hashes and all
    named = {entry.file for entry in manifest.files} | {"manifest.json"}
    assert {p.relative_to(directory).as_posix() for p in directory.rglob("*.*")} == named
    with load(directory) as pipeline, load(small_engines) as original:
        calls = pipeline("red apple", seed=5).timings.stages
        assert (len(calls["denoiser"]), len(calls["denoiser_cached"])) == (3, 3)
        request = {"seed": 5, "sampler": "ddim", "steps": 12}
        exact = pipeline("red apple", unaccelerated=True, **request)
        assert psnr(exact.latents, original("red apple", **request).latents) > 80


@pytest.mark.slow
def test_large_images_may_use_reduced_attention(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized = tmp_path / "optimized"
    optimize(
        tiny_engines,
        optimized,
        OptimizeRequest(gate=("images=1",), settings={"steps": 1}, repeats=0),
    )
    directory = few_steps(optimized, tmp_path / "engines", side=128)
    reduced = PlanCandidate(steps=2, variant=Variant(reduced=True))
    monkeypatch.setattr(SEARCH, "list_candidates", lambda *_, **__: [reduced])
    manifest = accelerate(directory, SearchRequest(gate=("psnr=1", "images=1"), effort=1))
    assert manifest.acceleration is not None and manifest.acceleration.variant == "denoiser_reduced"
    assert "denoiser_cached" not in manifest.components
    with load(directory) as pipeline:
        assert pipeline("red apple", seed=5).images[0].size == (128, 128)
        assert "denoiser_reduced" in pipeline.engines


def test_without_a_passing_plan_engines_stay_unaccelerated(
    small_engines: Path, tmp_path: Path
) -> None:
    directory = few_steps(small_engines, tmp_path / "engines")
    manifest = accelerate(directory, SearchRequest(gate=("psnr=99", "images=1"), effort=2))
    assert manifest.acceleration is None
    assert manifest.components == Manifest.read(small_engines).components
    assert [judged["failures"][0][:5] for judged in manifest.history[-1].options["plans"]] == [
        "image"
    ] * 2
    assert list(summary_lines(manifest)) == [
        "no plan, and the engines stay unaccelerated: none of the 2 plans that were judged passes "
        "psnr 99"
    ]
    assert not (directory / "plans").exists()


# the three sets of images


ONLY = PlanCandidate(steps=6)
FASTER = ConfidenceInterval(value=1.5, low=1.2, high=1.8, level=0.96875)


def loses_on(prompt: str) -> Callable[[Gallery, list[str]], int]:
    """Return an accuracy that plans lose on one prompt; it sees them before the reference."""
    calls = count()
    return lambda images, prompts: next(calls) % 2 if prompts == [prompt] else 1


def search_with(
    monkeypatch: pytest.MonkeyPatch, engines: Path, *, loser: str, speedup: ConfidenceInterval
) -> Manifest:
    """Search among one candidate, by one image a set, that loses on the prompt of one set."""
    monkeypatch.setattr(SEARCH, "list_candidates", lambda *_, **__: [ONLY])
    monkeypatch.setattr(SEARCH, "_speedup", lambda *_: speedup)
    request = SearchRequest(
        gate=("right=0", "images=1"),
        prompts=("select", "confirm", "report"),
        accuracies={"right": loses_on(loser)},
        effort=1,
    )
    return accelerate(engines, request)


def test_a_plan_that_is_not_confirmed_is_dropped(
    small_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = few_steps(small_engines, tmp_path / "engines")
    manifest = search_with(monkeypatch, directory, loser="confirm", speedup=FASTER)
    options = manifest.history[-1].options
    assert manifest.acceleration is None
    assert [row["failures"] for row in options["plans"]] == [[]]
    assert options["confirmation"][0]["failures"] and "report" not in options
    (line,) = summary_lines(manifest)
    assert line.endswith(
        "none of the 1 plans that were judged passes right within 0 points on both sets of images"
    )


def test_the_report_decides_nothing(
    small_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = few_steps(small_engines, tmp_path / "engines")
    manifest = search_with(monkeypatch, directory, loser="report", speedup=FASTER)
    options = manifest.history[-1].options
    assert manifest.acceleration is not None and manifest.acceleration.measured["right"] == 0
    assert [row["failures"] for row in options["confirmation"]] == [[]]
    assert options["report"]["failures"] == ["image: right loses 100 points and may lose 0"]
    assert (
        "WARNING: on these images the plan misses its gate (image: right loses"
        in list(summary_lines(manifest))[-1]
    )


def test_a_plan_that_may_be_slower_is_not_taken(
    small_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = few_steps(small_engines, tmp_path / "engines")
    unsure = ConfidenceInterval(value=1.5, low=0.95, high=1.8, level=0.96875)
    manifest = search_with(monkeypatch, directory, loser="", speedup=unsure)
    options = manifest.history[-1].options
    assert manifest.acceleration is None and options["plan"] == ""
    assert options["candidate"] == str(ONLY) and options["speedup"]["low"] == 0.95
    (line,) = summary_lines(manifest)
    assert "not certain to be above 1 (lower bound 0.95)" in line


# the command


def test_bad_input_costs_no_export(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(tiny_checkpoint), str(tmp_path / "out")
    for arguments, message in (
        (
            ["--fast", "--gate", "retrieval=2"],
            "gate retrieval is for images of the demo checkpoint",
        ),
        (["--fast", "--effort", "0"], "effort of a search is a number from 1 to 1000, not 0"),
        (["--fast", "--prompts", "none.txt"], "cannot read prompts from none.txt"),
        (["--effort", "3"], "--effort is for the search of a plan: add --fast"),
        (
            ["--fast", "--layout", "optimum"],
            "--layout optimum keeps the graphs as optimum needs them",
        ),
    ):
        assert main(["build", source, target, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_describes_the_search(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(tiny_checkpoint), str(tmp_path / "out"), "--fast", "--dry-run"]
    assert main([*command, "--gate", "ssim=0.8", "--effort", "7"]) == 0
    said = capsys.readouterr().out
    assert "judge up to 7 plans by 4 images each, and take the fastest with ssim 0.8" in said


def test_build_fast(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = shutil.copytree(tiny("bk-sdm"), tmp_path / "in"), tmp_path / "out"
    (source / "latentforge.json").write_text('{"defaults": {"steps": 12}}')
    command = ["build", str(source), str(target), "--fast", "--effort", "2"]
    command += ["--height", "32", "--width", "32", "--batch", "2"]  # free ones take longer
    assert main([*command, "--gate", "psnr=5", "--gate", "images=1", "--repeats", "6"]) == 0
    manifest, said = Manifest.read(target), capsys.readouterr().out
    names = [stage.name for stage in manifest.history]  # a cached step may come in between
    assert names[1] == "optimize" and names[-2:] == ["search", "build"]
    assert manifest.history[1].options["settings"]["gate"]["psnr"] == 40  # the recipe's own
    assert "recipe fp32 for cpu" in said and "2 plans were judged by psnr 5" in said
    assert (
        main(["run", str(target), "red apple", "-o", str(tmp_path / "a.png"), "--seed", "1"]) == 0
    )
