"""Figures of repeated runs: medians, and paired ratios with what is known of them."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from latentforge.measure.results import ConfidenceInterval, TimedRun

__all__ = ["bootstrap_median", "medians", "ratios"]

_RESAMPLES = 2000
_LEVEL = (2.5, 97.5)
_LEAST = 3  # values that say anything of how far they spread


def medians(runs: Sequence[TimedRun]) -> dict[str, float]:
    """Median seconds by stage, and ``joules`` where every run has them."""
    found = {
        stage: statistics.median(run.seconds[stage] for run in runs) for stage in _stages(runs)
    }
    spent = [run.joules for run in runs if run.joules is not None]
    return {**found, "joules": statistics.median(spent)} if len(spent) == len(runs) > 0 else found


def ratios(
    reference: Sequence[TimedRun], others: Sequence[TimedRun]
) -> dict[str, ConfidenceInterval]:
    """How many times faster the others were, by stage: runs of equal place make a pair.

    The value is the median of the pairs' ratios. Neighbours in time saw the same machine, so a
    drift that would blur a ratio of medians does not touch it.
    """
    stages = [stage for stage in _stages(reference) if stage in _stages(others)]
    pairs = list(zip(reference, others, strict=True))
    return {
        stage: bootstrap_median([a.seconds[stage] / max(b.seconds[stage], 1e-9) for a, b in pairs])
        for stage in stages
    }


def bootstrap_median(values: Sequence[float]) -> ConfidenceInterval:
    """The median with its 95 % interval, by the percentile bootstrap (Efron 1979).

    With fewer than some ten values the interval is about their range, and too narrow rather than
    too wide; below three there is none.
    """
    value = statistics.median(values)
    if len(values) < _LEAST:
        return ConfidenceInterval(value=value)
    draws = np.random.default_rng(0).choice(np.asarray(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), _LEVEL)
    return ConfidenceInterval(value=value, low=float(low), high=float(high))


def _stages(runs: Sequence[TimedRun]) -> list[str]:
    """What all of them have, in the order of the first."""
    first: Mapping[str, float] = runs[0].seconds if runs else {}
    return [stage for stage in first if all(stage in run.seconds for run in runs)]
