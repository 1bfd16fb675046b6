"""latentforge report: a page of what was measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output

__all__ = ["add"]


def add(commands: Any) -> None:
    parser = arguments.command(
        commands,
        "report",
        _report,
        "Draw a page of what bench and eval have written",
        "Several files share the page, and quality is then drawn against speed by the names of "
        "the participants. It loads nothing from anywhere. Needs pip install 'latentforge[report]'.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="their --json")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PAGE", help="the .html to write"
    )


def _report(options: argparse.Namespace) -> None:
    from latentforge.measure.report import render
    from latentforge.measure.results import Results

    output.check_writable(options.output)
    output.write_text(options.output, render(*map(Results.read, options.files)))
    print(options.output)
