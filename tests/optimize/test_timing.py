"""Timing of engines: the fastest of several, and figures of a speedup."""

from pathlib import Path

import pytest

from latentforge.measure.bench.protocol import Participant
from latentforge.measure.results import BenchResult, ConfidenceInterval
from latentforge.optimize import timing
from latentforge.optimize.timing import FreeMemoryError, fastest, speedup_figures, time_engines
from latentforge.runtime.errors import BackendError
from latentforge.runtime.loader import load


def results(**speedups: float) -> list[BenchResult]:
    return [
        BenchResult(name=name, role="engines", ratio={"total": ConfidenceInterval(value=value)})
        for name, value in speedups.items()
    ]


@pytest.mark.parametrize(
    ("speedups", "name"),
    [
        ({"a": 1.0, "b": 1.02}, "a"),  # within noise
        ({"a": 1.0, "b": 1.04}, "b"),
        ({"a": 1.0, "b": 1.02, "c": 1.04}, "c"),
        ({"a": 1.0, "b": 1.5, "c": 1.52}, "b"),
        ({"a": 0.5, "b": 0.4}, "a"),
    ],
)
def test_a_later_one_has_to_be_faster_by_more_than_noise(
    speedups: dict[str, float], name: str
) -> None:
    assert fastest(results(**speedups)) == name


def test_figures_of_a_speedup() -> None:
    assert speedup_figures(ConfidenceInterval(value=1.5)) == {"speedup": 1.5}
    bounded = ConfidenceInterval(value=1.5, low=1.2, high=1.9, level=0.75)
    assert speedup_figures(bounded) == {
        "speedup": 1.5,
        "speedup_low": 1.2,
        "speedup_high": 1.9,
        "speedup_level": 0.75,
    }


def test_engines_beyond_free_memory_are_not_timed(
    tiny_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(tiny_engines, hashes=False) as pipeline:
        settings = pipeline.settings("a cat", seed=0)
    monkeypatch.setattr(timing, "fit_together", lambda sizes: None)
    with pytest.raises(FreeMemoryError, match="too little memory is free"):
        time_engines([Participant.of(tiny_engines)], [1], settings, repeats=1)


def test_a_participant_that_fails_is_an_error(tiny_engines: Path, tmp_path: Path) -> None:
    with load(tiny_engines, hashes=False) as pipeline:
        settings = pipeline.settings("a cat", seed=0, steps=1)
    broken = Participant(name="broken", command=("/bin/false",), model=str(tmp_path))
    with pytest.raises(BackendError, match="broken"):
        time_engines([Participant.of(tiny_engines), broken], [1, 1], settings, repeats=1)
