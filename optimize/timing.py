"""Timing of engine directories: interleaved runs, paired speedups, and the fastest of several."""

from collections.abc import Mapping, Sequence

from latentforge.measure.bench.interleaved import measure, require_all_ok
from latentforge.measure.bench.protocol import Participant
from latentforge.measure.hardware import available_threads, fit_together
from latentforge.measure.results import BenchResult, ConfidenceInterval
from latentforge.runtime.errors import BackendError
from latentforge.runtime.progress import Progress
from latentforge.runtime.settings import Settings

__all__ = ["MARGIN", "FreeMemoryError", "fastest", "rounded", "speedup_figures", "time_engines"]

MARGIN = 1.03
"""Ratio by which a later candidate has to be faster than an earlier one: less is noise."""


class FreeMemoryError(BackendError):
    """Error raised if too little memory is free to load even one of the engines to time."""


def time_engines(
    participants: Sequence[Participant],
    sizes: Sequence[int],
    settings: Settings,
    *,
    repeats: int,
    quiet: bool = True,
    outer: Progress | None = None,
) -> dict[str, BenchResult]:
    """Time engine directories with interleaved runs of one request.

    All engines stay loaded if they fit into free memory together. Otherwise each is loaded for
    each of its runs.

    Args:
        participants: the first is the reference of the speedups.
        sizes: bytes of the engines of each participant.
        settings: the request.
        repeats: counted runs of each participant.
        quiet: show no progress.
        outer: progress whose current part shows that of the runs.

    Returns:
        The results by name of the participant, in the order of the participants.

    Raises:
        FreeMemoryError: the largest engines do not fit into free memory.
        BackendError: a participant failed.
    """
    together = fit_together(sizes)
    if together is None:
        raise FreeMemoryError(
            "too little memory is free to time these engines: close other programs"
        )
    measured = measure(
        participants,
        settings,
        threads=available_threads(),
        repeats=repeats,
        together=together,
        quiet=quiet,
        outer=outer,
    )
    return {result.name: result for result in require_all_ok(measured).entries}


def fastest(results: Sequence[BenchResult], stage: str = "total") -> str:
    """Return the name of the fastest participant by the paired speedup of a stage.

    An earlier participant is preferred unless a later one is faster by more than 3 %.
    """
    best = results[0]
    for result in results[1:]:
        if result.ratio[stage].value > MARGIN * best.ratio[stage].value:
            best = result
    return best.name


def speedup_figures(speedup: ConfidenceInterval) -> dict[str, float]:
    """Return a speedup as figures of a manifest.

    Returns:
        ``speedup``, the median over pairs, and, if there are enough pairs for an interval,
        ``speedup_low``, ``speedup_high`` and ``speedup_level``: the bounds and their confidence
        level.
    """
    bounds = {"low": speedup.low, "high": speedup.high, "level": speedup.level}
    given = {f"speedup_{name}": value for name, value in bounds.items() if value is not None}
    return {"speedup": speedup.value, **given}


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Return figures with four significant digits, for a manifest."""
    return {name: float(f"{value:.4g}") for name, value in figures.items()}
