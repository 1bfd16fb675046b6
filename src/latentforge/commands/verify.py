"""latentforge verify: check an engine directory on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments

__all__ = ["add", "verify_engines"]


def add(commands: Any) -> None:
    parser = arguments.command(
        commands,
        "verify",
        _verify,
        "Check an engine directory on this machine",
        "Compares sizes and hashes of all files, loads every engine, and generates an image of one "
        "step. Useful after copying a directory, or with a new driver or library version.",
    )
    parser.add_argument("engines", type=Path, metavar="ENGINES")


def _verify(options: argparse.Namespace) -> None:
    verify_engines(options.engines)


def verify_engines(engines: Path) -> None:
    """Check an engine directory, and print a line for each check that passes.

    Raises:
        LatentforgeError: a check fails.
    """
    from latentforge.runtime.compile.verify import verify

    for line in verify(engines):
        print(f"ok  {line}", flush=True)
