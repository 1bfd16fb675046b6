"""Command ``latentforge demo``: all stages on the demo checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the subparsers of the main parser."""
    parser = arguments.command(
        commands,
        "demo",
        _demo,
        "Run all stages on the demo checkpoint, and write a report to open in a browser",
        "Builds engines, makes a contact sheet with diffusers and with the engines, and times "
        "both. Needs pip install 'latentforge[cpu,demo,export]'.",
    )
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="default: demo-output",
    )


def _demo(options: argparse.Namespace) -> None:
    output.quiet_libraries()
    from latentforge.demo import run_demo

    page = run_demo(options.directory, quiet=False)
    print(f"\nopen {page.resolve()}")
