"""Damaged checkpoints are refused in one line, or work; nothing else happens."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

import torch
from hostile_checkpoints import FAMILIES, describe, write_case
from watched import failures, numbered, watched

from latentforge.export.checkpoint import open_checkpoint
from latentforge.export.families import family_of
from latentforge.export.schedulers import CheckpointScheduler, with_class
from latentforge.export.tokenizers import write_tokenizer


@pytest.fixture
def bases(tiny: Callable[[str], Path]) -> Mapping[str, Path]:
    return {family: tiny(family) for family in FAMILIES}


def read(path: Path, target: Path) -> None:
    """Read everything that an export reads before it runs the model."""
    checkpoint = open_checkpoint(str(path))
    family = family_of(checkpoint)
    plan = family.plan(checkpoint)
    own = checkpoint.config("scheduler", "scheduler_config.json")
    CheckpointScheduler.of(family.scheduler(with_class(own, checkpoint.index)), None)
    for name in plan.tokenizers:
        write_tokenizer(checkpoint, name, target)
    for component in plan.components:
        checkpoint.weights(component.folder)
    _ = checkpoint.license


def load(path: Path, index: int) -> None:
    """Load one of the modules."""
    checkpoint = open_checkpoint(str(path))
    plan = family_of(checkpoint).plan(checkpoint)
    plan.components[index % len(plan.components)].module(checkpoint)


def case(index: int, bases: Mapping[str, Path], place: Path) -> None:
    """Write and read the checkpoint of an index, in an empty folder."""
    torch.set_num_threads(1)
    os.chdir(place)
    clear(place)  # of a case that ended the process
    try:
        write_case(index, bases, place / "checkpoint")
        (place / "target").mkdir()
        read(place / "checkpoint", place / "target")
        load(place / "checkpoint", index)
    finally:
        clear(place)
        left = list(place.iterdir())
        assert not left, f"files outside the target: {left}"


def clear(place: Path) -> None:
    for name in ("checkpoint", "target"):
        shutil.rmtree(place / name, ignore_errors=True)


def check(bases: Mapping[str, Path], place: Path, indices: range) -> None:
    """Run cases, and fail with the names of those that ended otherwise."""
    place.mkdir()
    before = {path: path.stat().st_mtime_ns for base in bases.values() for path in base.rglob("*")}

    def run(index: int) -> None:
        case(index, bases, place)

    outcomes = list(watched(run, indices))
    ends = [outcome.end for outcome in outcomes]
    print({end: ends.count(end) for end in set(ends)}, max(o.seconds for o in outcomes))
    assert not failures(outcomes, lambda i: describe(i, bases, place / "named"))
    assert ends.count("works") > len(ends) / 20 and ends.count("refused") > len(ends) / 4
    after = {path: path.stat().st_mtime_ns for base in bases.values() for path in base.rglob("*")}
    assert after == before


@numbered(range(280, 310), full=1000)  # with an id that fills the memory
def test_damaged_checkpoints(bases: Mapping[str, Path], tmp_path: Path, indices: range) -> None:
    check(bases, tmp_path / "cases", indices)
