"""Comparison of two measurements with known answers, and the exit status of compare."""

from pathlib import Path
from typing import Any

import pytest
from measured import BENCH, EVAL, HEAD, entry, metric
from msgspec.structs import replace

from latentforge.__main__ import main
from latentforge.measure.conclusion import MIN_RUNS
from latentforge.measure.regression import Verdict, judge
from latentforge.measure.results import BenchResult, Metric, Results
from latentforge.measure.statistics import medians, paired_speedups
from latentforge.runtime.errors import ResultsError

REFERENCE = BENCH.entries[0]


def bench(*entries: BenchResult, **more: Any) -> Results:
    return Results(title="x", entries=entries, **{**HEAD, **more})


def found(verdict: Verdict, outcome: str) -> set[tuple[str, str]]:
    return {(c.subject, c.quantity) for c in verdict.changes if c.outcome == outcome}


def test_nothing_changes_between_a_file_and_itself() -> None:
    for results in (BENCH, EVAL):
        verdict = judge(results, results)
        assert {change.outcome for change in verdict.changes} == {"same"}
        assert not verdict.failed and verdict.worse == ()


def test_slower_beyond_the_tolerance_and_the_intervals_is_worse() -> None:
    old, new = (bench(REFERENCE, entry("mine", seconds, jitter=0)) for seconds in (2.0, 2.5))
    verdict = judge(old, new)
    stages = {("mine", name) for name in ("image", "denoiser step", "text encoder", "VAE decoder")}
    assert found(verdict, "worse") == stages and verdict.failed
    assert "image was 2.00x and is 1.60x (-20.0%)" in str(verdict)
    back = judge(new, old)
    assert found(back, "better") == stages and not back.failed


def test_slower_within_the_tolerance_is_the_same() -> None:
    old, new = (bench(REFERENCE, entry("mine", seconds, jitter=0)) for seconds in (2.0, 2.08))
    assert not judge(old, new).failed
    assert judge(old, new, tolerance=0.03).failed


def test_slower_by_the_median_with_intervals_that_overlap_is_the_same() -> None:
    old, new = (bench(REFERENCE, entry("mine", seconds, jitter=0.3)) for seconds in (2.0, 2.2))
    ratios = [results.entries[1].ratio["total"] for results in (old, new)]
    assert ratios[1].value < 0.95 * ratios[0].value and ratios[1].high > ratios[0].low
    assert not judge(old, new).failed


def test_a_slower_machine_is_no_regression_where_the_reference_is_slower_too() -> None:
    old, mine = bench(REFERENCE, entry("mine", 2.0)), entry("mine", 2.0)
    twice = {name: 2 * value for name, value in REFERENCE.median.items()}
    slow = replace(mine, median={name: 2 * value for name, value in mine.median.items()})
    verdict = judge(old, bench(replace(REFERENCE, median=twice), slow))
    assert not verdict.failed
    assert any("eager, the reference, took 4 s and takes 8 s" in note for note in verdict.notes)


@pytest.mark.parametrize("name", ["another", None])
def test_without_a_common_reference_seconds_are_compared(name: str | None) -> None:
    other = [replace(REFERENCE, name=name)] if name else []
    then, now = entry("mine", 2.0, jitter=0), entry("mine", 2.4, jitter=0)
    verdict = judge(bench(REFERENCE, then), bench(*other, now))
    assert ("mine", "image") in found(verdict, "worse")
    assert "mine: image was 2 s and is 2.4 s (+20.0%)" in str(verdict)


def test_overlapping_intervals_of_seconds_are_the_same() -> None:
    old, new = (bench(entry("mine", seconds, jitter=0.2)) for seconds in (2.0, 2.2))
    assert new.entries[0].median["total"] > 1.05 * old.entries[0].median["total"]
    assert not judge(old, new).failed


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("peak_memory", "peak memory"),
        ("device_memory", "device memory"),
        ("file_bytes", "file size"),
    ],
)
def test_single_values_are_judged_by_the_tolerance_alone(key: str, name: str) -> None:
    old, within, beyond, less = (
        bench(REFERENCE, entry("mine", 2.0, **{key: size * 1_000_000}))
        for size in (1000, 1049, 1051, 900)
    )
    assert not judge(old, within).failed
    assert found(judge(old, beyond), "worse") == {("mine", name)}
    assert found(judge(old, less), "better") == {("mine", name)}


def test_load_times_are_judged_by_their_intervals() -> None:
    old, apart, over = (
        bench(REFERENCE, entry("mine", 2.0, ready_seconds=times))
        for times in (
            (1.0, 1.05, 1.1, 1.15, 1.2),
            (1.5, 1.55, 1.6, 1.65, 1.7),
            (1.1, 1.2, 1.3, 1.35, 1.4),
        )
    )
    assert found(judge(old, apart), "worse") == {("mine", "load time")}
    assert not judge(old, over).failed


def test_the_memory_of_the_reference_is_judged_and_its_seconds_are_not() -> None:
    heavier = replace(REFERENCE, peak_memory=4_000_000_000)
    verdict = judge(bench(REFERENCE, entry("mine", 2.0)), bench(heavier, entry("mine", 2.0)))
    assert found(verdict, "worse") == {("eager", "peak memory")}
    assert ("eager", "image") not in found(verdict, "same")


def test_the_seconds_of_a_reference_that_ran_alone_are_judged() -> None:
    old, new = (bench(entry("engines", s, jitter=0, role="reference")) for s in (2.0, 2.4))
    assert ("engines", "image") in found(judge(old, new), "worse")
    assert not judge(old, old).failed


def test_a_participant_that_fails_or_is_gone_is_worse_and_back_is_better() -> None:
    mine = entry("mine", 2.0)
    broken = BenchResult(name="mine", role="engines", status="failed", message="out of memory")
    for now in ([broken], []):
        old, new = bench(REFERENCE, mine), bench(REFERENCE, *now)
        assert found(judge(old, new), "worse") == {("mine", "now")}
    assert "mine: now failed: out of memory" in str(judge(old, bench(REFERENCE, broken)))
    assert found(judge(bench(REFERENCE, broken), bench(REFERENCE, mine)), "better") == {
        ("mine", "now")
    }


def test_a_failed_reference_is_worse_and_seconds_are_compared() -> None:
    broken = BenchResult(name="eager", role="reference", status="failed", message="no memory")
    verdict = judge(bench(REFERENCE, entry("mine", 2.0)), bench(broken, entry("mine", 2.4)))
    assert {("eager", "now"), ("mine", "image")} <= found(verdict, "worse")


def test_a_different_image_is_worse() -> None:
    old = bench(REFERENCE, entry("mine", 2.0, psnr=100.0))
    new = bench(REFERENCE, entry("mine", 2.0, psnr=30.0, speed_class="B"))
    assert found(judge(old, new), "worse") == {("mine", "class"), ("mine", "PSNR")}
    invisible = bench(REFERENCE, entry("mine", 2.0, psnr=85.0))
    assert not judge(old, invisible).failed


def evaluation(*metrics: Metric) -> Results:
    return Results(title="x", metrics=metrics, **HEAD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("better", "now", "outcome"),
    [
        ("higher", (39.0, 38.9, 39.1), "worse"),
        ("higher", (39.0, 38.0, 40.0), "same"),
        ("higher", (41.0, 40.9, 41.1), "better"),
        ("lower", (39.0, 38.9, 39.1), "better"),
        ("lower", (41.0, 40.9, 41.1), "worse"),
    ],
)
def test_metrics_are_judged_by_their_intervals(
    better: str, now: tuple[float, float, float], outcome: str
) -> None:
    old = evaluation(metric("mine", 40.0, low=39.8, high=40.2, better=better))
    new = evaluation(metric("mine", now[0], low=now[1], high=now[2], better=better))
    assert [change.outcome for change in judge(old, new).changes] == [outcome]


def test_metrics_without_intervals_are_judged_by_the_tolerance() -> None:
    old, within, beyond = (evaluation(metric("mine", value)) for value in (40.0, 38.5, 37.5))
    assert not judge(old, within).failed
    assert found(judge(old, beyond), "worse") == {("mine", "psnr to eager")}


def test_metrics_against_another_reference_are_not_compared() -> None:
    old, new = evaluation(metric("mine", 40.0)), evaluation(metric("mine", 20.0, reference="else"))
    with pytest.raises(ResultsError, match="nothing to compare"):
        judge(old, new)


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 10), ("height", 64), ("sampler", "euler"), ("guidance_scale", 1.0)],
)
def test_other_settings_are_refused_in_one_line(key: str, value: object) -> None:
    settings = {**BENCH.settings, key: value}
    with pytest.raises(ResultsError) as caught:
        judge(BENCH, replace(BENCH, settings=settings))
    expected = f"{key} {BENCH.settings[key]} and {value}"
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert "steps" not in str(caught.value) or key == "steps"


def test_other_threads_are_refused() -> None:
    with pytest.raises(ResultsError, match="threads 2 and 4"):
        judge(BENCH, replace(BENCH, threads=4))


def test_a_different_machine_seed_and_prompt_are_noted() -> None:
    settings = {**BENCH.settings, "seed": 1, "prompts": ["a fox"]}
    other = replace(BENCH, settings=settings, machine={"cpu": "Other", "cores": "2"})
    notes = "\n".join(judge(BENCH, other).notes)
    assert "cpu was Some CPU and is Other" in notes and "cores" not in notes
    assert "seed changed" in notes and "prompts changed" in notes


def test_tuples_equal_the_lists_that_json_makes_of_them(tmp_path: Path) -> None:
    original = replace(BENCH, settings={**BENCH.settings, "crop": (0, 0)})
    original.write(tmp_path / "results.json")
    assert not judge(original, Results.read(tmp_path / "results.json")).failed


@pytest.mark.parametrize(("runs", "level"), [(1, ""), (2, "50 %"), (3, "75 %"), (4, "87.5 %")])
def test_too_few_runs_are_unclear_and_fail_nothing(runs: int, level: str) -> None:
    """A speedup, and seconds without a reference, of fewer runs than a conclusion needs."""
    old, new = (few(entry("mine", seconds, jitter=0), runs) for seconds in (2.0, 2.5))
    for verdict in (
        judge(bench(REFERENCE, old), bench(REFERENCE, new)),
        judge(bench(old), bench(new)),
    ):
        assert not verdict.failed and ("mine", "image") in found(verdict, "unclear")
        (line,) = [line for line in str(verdict).splitlines() if "mine: image" in line]
        assert line.startswith("unclear") and "too few to conclude, run 5 or more" in line
        assert f"{runs} run" in line and level in line


def test_too_few_runs_in_one_file_are_named() -> None:
    old, new = entry("mine", 2.0, jitter=0), few(entry("mine", 2.5, jitter=0), 3)
    text = str(judge(bench(REFERENCE, old), bench(REFERENCE, new)))
    assert "new file has 3 runs: 75 % interval" in text and "old file" not in text


def test_too_few_runs_within_the_tolerance_are_the_same() -> None:
    old, new = (few(entry("mine", seconds, jitter=0), 3) for seconds in (2.0, 2.01))
    assert not found(judge(bench(REFERENCE, old), bench(REFERENCE, new)), "unclear")


def few(result: BenchResult, count: int) -> BenchResult:
    """Return a result with its first runs only."""
    runs = result.runs[:count]
    ratio = paired_speedups(REFERENCE.runs[:count], runs)
    return replace(result, runs=runs, median=medians(runs), ratio=ratio)


# the command line


def files(tmp_path: Path, old: Results, new: Results) -> list[str]:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, results in zip(paths, (old, new), strict=True):
        results.write(path)
    return [str(path) for path in paths]


def test_exit_status_is_0_where_nothing_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *files(tmp_path, BENCH, BENCH)]) == 0
    assert "values unchanged" in capsys.readouterr().out


def test_exit_status_is_3_where_something_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = bench(REFERENCE, entry("mine", 2.4))
    paths = files(tmp_path, bench(REFERENCE, entry("mine", 2.0)), slower)
    assert main(["compare", *paths]) == 3
    output = capsys.readouterr()
    assert "worse   mine: image" in output.out
    assert output.err.startswith("latentforge: 4 worse than in ") and output.err.count("\n") == 1
    assert main(["compare", *paths, "--tolerance", "25"]) == 0


def test_the_help_names_the_fewest_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert f"fewer than {MIN_RUNS} runs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("tolerance", ["-1", "101", "nan"])
def test_an_impossible_tolerance_is_refused(
    tolerance: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = files(tmp_path, BENCH, BENCH)
    assert main(["compare", *paths, "--tolerance", tolerance]) == 2
    assert "0 to 100 percent" in capsys.readouterr().err


def test_files_of_different_requests_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *files(tmp_path, BENCH, replace(BENCH, threads=1))]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["compare", str(tmp_path / "none.json"), str(tmp_path / "old.json")]) == 2
