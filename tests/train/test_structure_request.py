"""Requests of a search: one goal, in range."""

import pytest

from latentforge.runtime.errors import SettingsError
from latentforge.train.search.request import StructureRequest


@pytest.mark.parametrize(
    ("goals", "words"),
    [
        ({}, "give one of speedup, latency, parameters, memory"),
        ({"speedup": 2.0, "latency": 0.1}, "not speedup and latency"),
        ({"speedup": 1.0}, "speedup is above 1"),
        ({"speedup": float("nan")}, "speedup is above 1"),
        ({"latency": 0.0}, "latency is above 0"),
        ({"parameters": -1}, "parameters is above 0"),
        ({"speedup": "fast"}, "speedup"),
        ({"speedup": 2.0, "budget": 0.0}, "budget"),
        ({"speedup": 2.0, "size": 0}, "size"),
    ],
)
def test_a_request_without_one_goal_in_range_is_refused(
    goals: dict[str, float], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        StructureRequest(**goals)


def test_limits() -> None:
    assert StructureRequest(speedup=2.0).limit(0.5) == 0.25
    assert StructureRequest(parameters=400).limit(800) == 400
    with pytest.raises(SettingsError, match="the checkpoint itself has 300"):
        StructureRequest(parameters=400).limit(300)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(SettingsError, match="did you mean 'cpu'"):
        StructureRequest(speedup=2.0, target="cpus").check_target()
