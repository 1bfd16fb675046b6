"""Hostile arguments are refused in one line, or taken; nothing else happens."""

import os
from pathlib import Path

from conftest import Handmade
from hostile_settings import request
from watched import failures, numbered, watched

from latentforge.runtime.loader import load


def check(engines: Path, place: Path, indices: range) -> None:
    place.mkdir()
    pipeline = load(engines)

    def run(index: int) -> None:
        os.chdir(place)
        arguments = request(index)
        list(pipeline.stream(**arguments))

    outcomes = list(watched(run, indices))
    ends = [outcome.end for outcome in outcomes]
    print({end: ends.count(end) for end in set(ends)}, max(o.seconds for o in outcomes))
    assert not failures(outcomes, lambda index: repr(request(index).keys()))
    assert ends.count("works") > len(ends) / 50 and ends.count("refused") > len(ends) / 3
    assert {path.name for path in place.iterdir()} <= {"fifo"}


@numbered(range(300), full=5000)
def test_hostile_settings(handmade: Handmade, tmp_path: Path, indices: range) -> None:
    check(handmade(), tmp_path / "cases", indices)
