"""latentforge demo: everything, on the embedded checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output

__all__ = ["add"]


def add(commands: Any) -> None:
    parser = arguments.command(
        commands,
        "demo",
        _demo,
        "Do it all on the embedded checkpoint, and leave a page to open",
        "Builds engines, makes a contact sheet by diffusers and by the engines, and times both.",
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
    from latentforge.build import BuildRequest, build
    from latentforge.demo import showcase
    from latentforge.optimize.stage.request import OptimizeRequest

    def make(engines: Path) -> None:
        optimization = OptimizeRequest(overwrite=engines.exists(), quiet=False, repeats=0)
        build("demo", engines, BuildRequest(optimization=optimization))

    page = showcase(options.directory, make, quiet=False)
    print(f"\nopen {page.resolve()}")
