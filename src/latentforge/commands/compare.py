"""latentforge compare: regressions between two measurements."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments
from latentforge.runtime.errors import GateError, SettingsError

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = arguments.command(
        commands,
        "compare",
        _compare,
        "Report what became slower, larger or worse between two result files",
        "Both must be of the same request. Speeds are compared relative to the reference if both "
        "files have the same one. A value has changed if it differs by more than the tolerance and "
        "the confidence intervals do not overlap; speeds from fewer than 5 runs are reported as "
        "unclear. The exit status is 3 if anything became worse.",
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="the baseline: a --json file")
    parser.add_argument("new", type=Path, metavar="NEW", help="the file to compare with it")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="change that counts as none (default: 5)",
    )


def _compare(options: argparse.Namespace) -> None:
    from latentforge.measure.regression import judge
    from latentforge.measure.results import Results
    from latentforge.runtime.record import escaped

    if not 0 <= options.tolerance <= 100:
        raise SettingsError(f"--tolerance must be 0 to 100 percent, not {options.tolerance:g}")
    old, new = (escaped(Results.read(path)) for path in (options.old, options.new))
    verdict = judge(old, new, tolerance=options.tolerance / 100)
    print(verdict)
    if verdict.failed:
        raise GateError(f"{len(verdict.worse)} worse than in {options.old}: {verdict.worse[0]}")
