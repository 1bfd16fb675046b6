"""Hostile options of every command end in status 2 and one line, or the command works."""

import io
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

from hostile_commands import command_line
from hostile_requests import Places, write_files
from measured import BENCH
from test_requests import listing
from watched import failures, numbered, watched

from latentforge.__main__ import main
from latentforge.runtime.errors import LatentforgeError

pytest_plugins = ["test_requests"]

GATE_FAILED = 3


def case(index: int, places: Places, place: Path) -> None:
    """Run the command of an index in a folder of hostile files, and check how it ends."""
    os.chdir(place)
    before = listing(place.parent)
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        status = run(command_line(index, places))
    lines = errors.getvalue().splitlines()
    shown = (*output.getvalue().splitlines(), *lines)
    assert all(line.replace("\t", " ").isprintable() for line in shown), shown
    changed = listing(place.parent) != before
    if changed:
        renew(place)
    if status == 2:
        assert not changed and len(lines) == 1, lines
        raise LatentforgeError(lines[0])
    assert status in (0, GATE_FAILED), (status, lines)


def run(arguments: list[str]) -> int:
    """Return the exit status of a command."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def renew(place: Path) -> None:
    """Empty a folder, and write the hostile files."""
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_files(place)
    (place / "good.json").write_bytes(BENCH.encode())


def check(places: Places, place: Path, indices: range) -> None:
    """Run cases, and fail with the command lines of those that ended otherwise."""
    place.mkdir()
    renew(place)

    def run_case(index: int) -> None:
        case(index, places, place)

    outcomes = list(watched(run_case, indices))
    ends = [outcome.end for outcome in outcomes]
    print({end: ends.count(end) for end in set(ends)}, max(o.seconds for o in outcomes))
    assert not failures(outcomes, lambda index: str(command_line(index, places))[:300])
    assert ends.count("works") > len(ends) / 50 and ends.count("refused") > len(ends) / 3


@numbered(range(200), full=2000)
def test_hostile_commands(places: Places, tmp_path: Path, indices: range) -> None:
    check(places, tmp_path / "cases", indices)
