"""latentforge verify: whether an engine directory is sound here."""

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
        "Check that an engine directory is sound, here and now",
        "Sizes and hashes of all files, loading every engine, and an image of one step: worth "
        "doing after a copy, a new driver or a new library version.",
    )
    parser.add_argument("engines", type=Path, metavar="ENGINES")


def _verify(options: argparse.Namespace) -> None:
    verify_engines(options.engines)


def verify_engines(engines: Path) -> None:
    """Check them, with a line for each thing that holds."""
    from latentforge.runtime.compile.verify import verify

    for line in verify(engines):
        print(f"ok  {line}", flush=True)
