"""latentforge optimize: rewrite exported engines by a recipe."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    from latentforge.optimize.recipes import names, summary

    parser = arguments.command(
        commands,
        "optimize",
        _optimize,
        "Optimize exported engines by a recipe, behind a quality gate",
        "Fuses, partitions, converts, quantizes and prunes the graphs as the recipe says. Then "
        "the engines before and after generate the same images: a result below the gate is kept "
        "as ENGINES.rejected (exit status 3). Needs pip install 'latentforge[optimize]'.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="engines that export wrote")
    arguments.add_target(parser)
    parser.add_argument(
        "--target",
        default="cpu",
        choices=arguments.TARGETS,
        help="backend that will run the engines (default: cpu)",
    )
    arguments.add_recipe(parser, "--recipe", default="fp32")
    arguments.add_request(
        parser.add_argument_group(
            "schedule to deploy",
            "Calibration, gate and timing use these settings. Default: the manifest's.",
        )
    )
    arguments.add_table(parser, "recipes", {name: summary(name) for name in names()})


def _optimize(options: argparse.Namespace) -> None:
    from latentforge.optimize.stage.stage import optimize

    request = arguments.optimize_request(options, options.recipe)
    request = replace(request, settings=arguments.request_of(options))
    output.print_changes(optimize(options.source, options.engines, request))
    output.print_next_step(options.engines)
