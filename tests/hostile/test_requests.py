"""Hostile arguments of the Python API are refused in one line before any work, or taken."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from stat import S_ISDIR

import pytest

pytest.importorskip("diffusers", exc_type=ImportError)
pytest.importorskip("torchmetrics", exc_type=ImportError)

from conftest import Handmade
from hostile_requests import Places, call, describe, write_files
from watched import failures, numbered, watched


@pytest.fixture
def places(handmade: Handmade, tiny: Callable[[str], Path], tmp_path: Path) -> Places:
    broken = Path(shutil.copytree(tiny("sd"), tmp_path / "broken"))
    for weights in broken.glob("unet/*.safetensors"):
        weights.unlink()
    return Places(engines=handmade(), checkpoint=tiny("sd"), broken=broken)


def listing(place: Path) -> dict[str, int]:
    """Return when each file of a folder was changed; 0 for folders."""
    entries = {str(path): path.lstat() for path in place.rglob("*")}
    return {
        path: 0 if S_ISDIR(entry.st_mode) else entry.st_mtime_ns for path, entry in entries.items()
    }


def check(places: Places, place: Path, indices: range) -> None:
    """Make calls in a folder of hostile files, and fail with the names of those that failed."""
    place.mkdir()
    write_files(place)
    before = listing(place.parent)

    def run(index: int) -> None:
        os.chdir(place)
        call(index, places)

    outcomes = list(watched(run, indices))
    ends = [outcome.end for outcome in outcomes]
    print({end: ends.count(end) for end in set(ends)}, max(o.seconds for o in outcomes))
    assert not failures(outcomes, lambda index: describe(index, places))
    assert ends.count("works") > len(ends) / 50 and ends.count("refused") > len(ends) / 3
    assert listing(place.parent) == before


@numbered(range(300), full=2000)
def test_hostile_requests(places: Places, tmp_path: Path, indices: range) -> None:
    check(places, tmp_path / "cases", indices)
