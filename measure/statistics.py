"""Statistics of repeated runs: medians, paired speedups, and confidence intervals of a median."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence

from latentforge.measure.results import ConfidenceInterval, TimedRun

__all__ = [
    "CONFIDENCE",
    "interval_level",
    "median_interval",
    "medians",
    "paired_speedups",
    "spearman",
]

CONFIDENCE = 0.95
"""Confidence level that an interval reaches wherever there are enough values for it."""


def medians(runs: Sequence[TimedRun]) -> dict[str, float]:
    """Return the median seconds of each stage, and ``joules`` if every run has them."""
    seconds = {
        stage: statistics.median(run.seconds[stage] for run in runs)
        for stage in _common_stages(runs)
    }
    joules = [run.joules for run in runs if run.joules is not None]
    if len(joules) == len(runs) > 0:
        return {**seconds, "joules": statistics.median(joules)}
    return seconds


def paired_speedups(
    reference: Sequence[TimedRun], candidate: Sequence[TimedRun]
) -> dict[str, ConfidenceInterval]:
    """Return the speedup of a candidate over the reference, by stage.

    Runs at equal positions form a pair, and the value is the median of the pairs' ratios. The two
    runs of a pair are neighbours in time, so a drift of the machine's speed, which would blur a
    ratio of medians, cancels out.

    Args:
        reference: its runs in order of time.
        candidate: as many runs, interleaved with those of the reference.
    """
    stages = [stage for stage in _common_stages(reference) if stage in _common_stages(candidate)]
    pairs = list(zip(reference, candidate, strict=True))
    return {
        stage: median_interval([a.seconds[stage] / max(b.seconds[stage], 1e-9) for a, b in pairs])
        for stage in stages
    }


def median_interval(values: Sequence[float]) -> ConfidenceInterval:
    """Return the median of a sample with its distribution-free confidence interval.

    The interval lies between two order statistics. For n independent values of any continuous
    distribution, the k-th smallest and the k-th largest enclose the distribution's median with
    probability 1 - 2 P(B <= k - 1), where B is binomial with n trials and p = 1/2 (David &
    Nagaraja, Order Statistics, 3rd edition, 2003, section 7.1). From six values on, this is the
    narrowest such pair that reaches CONFIDENCE. With fewer it is the sample's range, and ``level``
    is what the range has: 50 % for two values, 75 % for three, 87.5 % for four, 93.75 % for five.
    A single value has no interval.

    Args:
        values: one or more; their order does not matter.
    """
    ordered = sorted(values)
    count, value = len(ordered), statistics.median(ordered)
    if count < 2:
        return ConfidenceInterval(value=value)
    rank, level = _rank_and_level(count)
    return ConfidenceInterval(value=value, low=ordered[rank - 1], high=ordered[-rank], level=level)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation of paired values, from -1 to 1; equal ones share a rank.

    NaN if there are fewer than two pairs, or all values of one side are equal.
    """
    ranks = [_ranks(values) for values in (first, second)]
    if len(first) < 2 or any(len(set(r)) == 1 for r in ranks):
        return math.nan
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, from 0; equal values have the mean of their places."""
    ordered = sorted(values)
    first = {value: place for place, value in reversed([*enumerate(ordered)])}
    last = {value: place for place, value in enumerate(ordered)}
    return [(first[value] + last[value]) / 2 for value in values]


def interval_level(count: int) -> float:
    """Return the level of the interval that median_interval() gives for ``count`` values."""
    return _rank_and_level(count)[1]


@functools.cache
def _rank_and_level(count: int) -> tuple[int, float]:
    """Return the largest rank whose interval reaches CONFIDENCE, and the interval's level.

    Without such a rank it is 1, the range of the values.
    """
    total = 1 << count
    outside = 2  # of 2**count equally likely sign patterns, those whose median is out of bounds
    rank = 1
    while rank < count // 2:
        wider = outside + 2 * math.comb(count, rank)
        if 1 - wider / total < CONFIDENCE:
            break
        rank, outside = rank + 1, wider
    return rank, 1 - outside / total


def _common_stages(runs: Sequence[TimedRun]) -> list[str]:
    """Return the stages that all runs have, in the order of the first run."""
    first: Mapping[str, float] = runs[0].seconds if runs else {}
    return [stage for stage in first if all(stage in run.seconds for run in runs)]
