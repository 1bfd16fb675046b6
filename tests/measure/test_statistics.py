"""Statistics of repeated runs, and the conclusions that they support."""

from itertools import pairwise

import numpy as np
import pytest
from measured import BENCH, EVAL, entry
from msgspec.structs import replace

from latentforge.measure.bench import REPEATS
from latentforge.measure.conclusion import (
    MIN_LEVEL,
    MIN_RUNS,
    finding,
    interval_text,
    is_wide,
    summary_sentences,
    too_few_runs,
)
from latentforge.measure.formatting import level
from latentforge.measure.quality import intervals
from latentforge.measure.results import ConfidenceInterval, TimedRun
from latentforge.measure.statistics import (
    interval_level,
    median_interval,
    medians,
    paired_speedups,
    spearman,
)


def runs(*totals: float) -> list[TimedRun]:
    return [TimedRun(seconds={"total": total}) for total in totals]


def bounded(low: float, high: float, level: float = 0.95) -> ConfidenceInterval:
    return ConfidenceInterval(value=(low + high) / 2, low=low, high=high, level=level)


# medians and their intervals


def test_speedups_are_paired() -> None:
    """A tenfold slowdown of the machine during the benchmark changes no ratio of neighbours."""
    drift = np.geomspace(1, 10, 9)
    speedup = paired_speedups(runs(*(3 * drift)), runs(*drift))["total"]
    assert (speedup.value, speedup.low, speedup.high) == pytest.approx((3, 3, 3))


def test_a_stage_that_some_runs_lack_has_no_speedup() -> None:
    whole = [TimedRun(seconds={"total": 2.0, "vae_decoder": 1.0})] * 2
    assert paired_speedups(whole, runs(1.0, 1.0)).keys() == {"total"}


@pytest.mark.parametrize(
    ("count", "rank", "expected"),
    [
        (2, 1, 0.5),
        (3, 1, 0.75),
        (4, 1, 0.875),
        (5, 1, 0.9375),
        (6, 1, 0.96875),
        (7, 1, 0.984375),
        (8, 1, 0.9921875),
        (9, 2, 0.9609375),
        (10, 2, 0.978515625),
        (15, 4, 0.96484375),
        (20, 6, 0.9586105346679688),
    ],
)
def test_the_level_is_exact_and_the_interval_the_narrowest(
    count: int, rank: int, expected: float
) -> None:
    """Levels and ranks of the sign test's tables, for values 1 to n in any order."""
    values = np.random.default_rng(count).permutation(np.arange(1.0, count + 1)).tolist()
    found = median_interval(values)
    assert (found.low, found.high) == (rank, count + 1 - rank)
    assert found.level == interval_level(count) == expected
    assert found.value == (count + 1) / 2


def test_one_value_has_no_interval() -> None:
    assert median_interval([2.0]) == ConfidenceInterval(value=2.0)


def test_many_values_have_a_finite_level() -> None:
    """The largest number of runs that a benchmark may have, and more."""
    assert 0.95 <= interval_level(1000) < 0.96
    assert 0.95 <= interval_level(3000) < 0.96


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 9, 15])
@pytest.mark.parametrize("shape", ["lognormal", "exponential", "uniform"])
def test_the_interval_covers_the_median_as_often_as_its_level_says(count: int, shape: str) -> None:
    """20,000 samples: within four standard errors, whatever the distribution."""
    trials = 20_000
    generator = np.random.default_rng(count)
    draws = {
        "lognormal": lambda size: generator.lognormal(0.0, 0.5, size),
        "exponential": lambda size: generator.exponential(1 / np.log(2), size),
        "uniform": lambda size: generator.uniform(0.5, 1.5, size),
    }[shape]((trials, count))
    found = [median_interval(row) for row in draws.tolist()]
    hits = np.mean([i.low <= 1.0 <= i.high for i in found if i.low is not None and i.high])
    expected = interval_level(count)
    assert abs(hits - expected) < 4 * np.sqrt(expected * (1 - expected) / trials)


def test_medians_have_joules_if_every_run_has() -> None:
    metered = [
        TimedRun(seconds={"total": 1.0}, joules=5.0),
        TimedRun(seconds={"total": 3.0}, joules=7.0),
    ]
    assert medians(metered) == {"total": 2.0, "joules": 6.0}
    assert medians([*metered, TimedRun(seconds={"total": 9.0})]) == {"total": 3.0}
    assert medians([]) == {}


def test_spearman_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    first, second = random.integers(0, 9, 40), random.integers(0, 9, 40)
    for pair in ((first, second), (first, first**2), (first, -first)):
        expected = stats.spearmanr(*pair).statistic
        assert spearman(*(values.tolist() for values in pair)) == pytest.approx(expected)
    assert np.isnan(spearman([1.0], [2.0])) and np.isnan(spearman([1.0, 2.0], [3.0, 3.0]))


def test_intervals_of_quality_metrics_carry_their_level() -> None:
    values = np.random.default_rng(0).normal(3, 1, 40)
    found = [
        intervals.mean(values),
        intervals.proportion(8, 10),
        intervals.centred(3.0, values),
    ]
    assert [interval.level for interval in found] == [intervals.LEVEL] * 3 == [0.95] * 3
    assert intervals.mean(values[:1]).level is None


# conclusions


def test_the_fewest_conclusive_runs_are_the_default() -> None:
    assert MIN_RUNS == REPEATS == 5
    assert interval_level(MIN_RUNS) >= MIN_LEVEL > interval_level(MIN_RUNS - 1)


@pytest.mark.parametrize(
    ("speedup", "expected"),
    [
        (bounded(1.9, 2.1), "faster"),
        (bounded(0.5, 0.6), "slower"),
        (bounded(0.99, 1.02), "no difference"),
        (bounded(1.9, 2.1, 0.9375), "faster"),
        (bounded(1.9, 2.1, 0.875), "too few runs"),
        (bounded(0.99, 1.02, 0.75), "too few runs"),
        (bounded(1.9, float("inf")), "too few runs"),
        (ConfidenceInterval(value=2.0), "too few runs"),
    ],
)
def test_findings(speedup: ConfidenceInterval, expected: str) -> None:
    assert finding(speedup) == expected


@pytest.mark.parametrize(
    ("low", "high", "wide"), [(1.0, 1.25, False), (1.0, 1.26, True), (0.0, 0.5, True)]
)
def test_wide_intervals(low: float, high: float, wide: bool) -> None:
    assert is_wide(bounded(low, high)) is wide
    assert not is_wide(ConfidenceInterval(value=1.0))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_too_few_runs_are_said_with_their_level_and_the_remedy(count: int) -> None:
    text = too_few_runs(median_interval([1.0, 1.1, 1.2, 1.3][:count]), count)
    levels = {2: "50 %", 3: "75 %", 4: "87.5 %"}
    expected = f"{count} runs: {levels[count]} interval, " if count > 1 else "1 run: "
    assert text == f"{expected}too few to conclude, run 5 or more"


def test_levels_have_at_most_one_decimal() -> None:
    assert [level(interval_level(n)) for n in (2, 3, 4, 5, 6)] == [
        "50 %", "75 %", "87.5 %", "93.8 %", "96.9 %",
    ]  # fmt: skip
    assert level(0.95) == "95 %" and level(1.0) == "100 %"


def test_intervals_are_written_with_their_level() -> None:
    assert interval_text(bounded(1.9, 2.1, 0.9375)) == "1.90–2.10, 93.8 %"
    assert interval_text(ConfidenceInterval(value=2.0)) == ""


# sentences


def test_the_summary_is_honest_about_a_loss() -> None:
    engines, peer = entry("mine", 5.0, jitter=0), entry("peer", 2.0, role="peer", jitter=0)
    sentences = summary_sentences(replace(BENCH, entries=(BENCH.entries[0], peer, engines)))
    assert sentences == [
        "mine generates the same image in 5.00 s: it takes 1.25 times as long as eager "
        "(93.8 % interval 1.25 to 1.25).",
        "The fastest peer with the same image, peer, takes 2.00 s: mine takes 2.50 times as long "
        "as peer (93.8 % interval 2.50 to 2.50).",
    ]


def test_the_summary_concludes_nothing_from_three_runs() -> None:
    engines = entry("mine", 2.0, jitter=0)
    few = replace(
        engines,
        runs=engines.runs[:3],
        ratio={"total": median_interval([2.0, 2.1, 2.2])},
    )
    (sentence,) = summary_sentences(replace(BENCH, entries=(BENCH.entries[0], few)))
    assert sentence == (
        "mine generates the same image in 2.00 s: speedup over eager 2.10× (3 runs: 75 % interval, "
        "too few to conclude, run 5 or more)."
    )


@pytest.mark.parametrize(
    ("speedup", "clause"),
    [
        (bounded(0.9, 1.1), "no significant difference from eager (speedup 95 % interval 0.90 "),
        (bounded(1.1, 1.6), "it is faster than eager, by an uncertain factor (95 % interval 1.10"),
        (bounded(1.9, 2.1), "it is 2.00 times as fast as eager (95 % interval 1.90 to 2.10)"),
        (bounded(0.4, 0.6), "it is slower than eager, by an uncertain factor (95 % interval 1.67"),
    ],
)
def test_clauses(speedup: ConfidenceInterval, clause: str) -> None:
    engines = entry("mine", 2.0, ratio={"total": speedup})
    (sentence,) = summary_sentences(replace(BENCH, entries=(BENCH.entries[0], engines)))
    assert clause in sentence


def test_the_summary_compares_the_fastest_of_the_same_class() -> None:
    text = "\n".join(summary_sentences(BENCH))
    assert "engines-a generates the same image in" in text and "peer-a, takes" in text
    assert "engines-b generates a different image in" in text and "peer-b" not in text


def test_the_summary_of_little() -> None:
    failed = BENCH.entries[5:]
    assert summary_sentences(replace(BENCH, entries=failed)) == ["No participant completed a run."]
    assert summary_sentences(replace(BENCH, entries=BENCH.entries[:1])) == [
        "eager generates an image in 4.00 s."
    ]
    assert summary_sentences(EVAL) == []


def test_results_are_ranked_by_paired_speedup() -> None:
    """A participant that ran while the machine was slow does not rank lower for it."""
    late = entry("late", 3.0, ratio={"total": ConfidenceInterval(value=2.0)})
    early = entry("early", 2.0, ratio={"total": ConfidenceInterval(value=1.5)})
    alone = entry("alone", 3.0, ratio={})
    assert late.relative_time < early.relative_time
    assert alone.relative_time == alone.median["total"]


def test_intervals_narrow_with_more_runs() -> None:
    values = np.random.default_rng(3).lognormal(0.0, 0.2, 64).tolist()
    widths = [
        (found.high or 0) - (found.low or 0)
        for count in (8, 16, 32, 64)
        if (found := median_interval(values[:count]))
    ]
    assert all(narrower < wider for wider, narrower in pairwise(widths))
