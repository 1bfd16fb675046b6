"""latentforge compare: what got worse between two measurements."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments
from latentforge.runtime.errors import GateError, SettingsError

__all__ = ["add"]


def add(commands: Any) -> None:
    parser = arguments.command(
        commands,
        "compare",
        _compare,
        "Say what got slower, larger or worse between two measurements",
        "Of the same request, by the same reference if both have one. Slower is what is off by "
        "more than the tolerance and outside of the other's interval; then the exit status is 3.",
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="a --json of bench or eval")
    parser.add_argument("new", type=Path, metavar="NEW", help="one that should be no worse")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="by which a figure may be worse (default: 5)",
    )


def _compare(options: argparse.Namespace) -> None:
    from latentforge.measure.regression import judge
    from latentforge.measure.results import Results

    if not 0 <= options.tolerance <= 100:
        raise SettingsError(f"--tolerance is 0 to 100 percent, not {options.tolerance:g}")
    old, new = map(Results.read, (options.old, options.new))
    verdict = judge(old, new, tolerance=options.tolerance / 100)
    print(verdict)
    if verdict.failed:
        raise GateError(f"{len(verdict.worse)} worse than in {options.old}: {verdict.worse[0]}")
