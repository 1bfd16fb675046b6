"""latentforge optimize: exported engines rewritten by a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output

__all__ = ["add"]


def add(commands: Any) -> None:
    from latentforge.optimize.recipes import names, summary

    parser = arguments.command(
        commands,
        "optimize",
        _optimize,
        "Rewrite exported engines by a recipe, behind a quality gate",
        "Fuses, cuts, converts, quantizes and prunes graphs as the recipe says, then makes the "
        "same pictures with both: what is not good enough is kept as ENGINES.rejected (exit 3). "
        "Needs pip install 'latentforge[optimize]'.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="what export wrote")
    arguments.add_target(parser)
    parser.add_argument(
        "--target",
        default="cpu",
        choices=arguments.TARGETS,
        help="what will run them (default: cpu)",
    )
    arguments.add_recipe(parser, "--recipe", default="fp32")
    arguments.add_request(
        parser.add_argument_group(
            "the schedule that will be deployed",
            "Calibration, gate and timing follow it. Default: the manifest's.",
        )
    )
    arguments.add_table(parser, "recipes", {name: summary(name) for name in names()})


def _optimize(options: argparse.Namespace) -> None:
    from latentforge.optimize.stage.stage import optimize

    manifest = optimize(
        options.source,
        options.engines,
        recipe=options.recipe,
        backend=options.target,
        request=arguments.request_of(options),
        overwrite=options.overwrite,
        quiet=False,
        **arguments.recipe_of(options),
    )
    output.print_changes(manifest)
    output.print_next_step(options.engines)
