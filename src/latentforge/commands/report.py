"""latentforge report: an HTML page of results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = arguments.command(
        commands,
        "report",
        _report,
        "Write an HTML page of results from bench and eval",
        "Several files share one page; quality from one file is plotted against speed from "
        "another, joined by the participants' names. The page is self-contained. Needs pip install "
        "'latentforge[report]'.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a --json result file")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PAGE", help="the .html file to write"
    )


def _report(options: argparse.Namespace) -> None:
    from latentforge.measure.report import render
    from latentforge.measure.results import Results
    from latentforge.runtime.files import check_file_target

    check_file_target(options.output)
    output.write_text(options.output, render(*map(Results.read, options.files)))
    print(options.output)
