"""latentforge build: all stages from a checkpoint to engines, and a search for a plan."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.commands import arguments, output
from latentforge.commands.export import export_engines
from latentforge.commands.verify import verify_engines
from latentforge.runtime.errors import DeviceError, SettingsError

if TYPE_CHECKING:
    from latentforge.optimize.search.search import SearchRequest
    from latentforge.runtime.manifest import Manifest
    from latentforge.runtime.shapes import Sizes

__all__ = ["add"]


def add(commands: Any) -> None:
    parser = arguments.command(
        commands,
        "build",
        _build,
        "Make engines of a checkpoint, ready to run on this machine",
        "Exports, optimizes behind a quality gate, and verifies the result; this is what most "
        "people want. Needs pip install 'latentforge[cpu,export]'.",
    )
    arguments.add_stage(parser)
    arguments.add_sizes(parser)
    parser.add_argument(
        "--target",
        default="cpu",
        choices=[*arguments.TARGETS, "auto"],
        help="what will run the engines; auto measures what can run here, component by component "
        "(default: cpu)",
    )
    arguments.add_option(parser)
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "int8", "auto"],
        help="the recipe of that name; auto takes the fastest on this machine that passes its gate "
        "(default: fp32)",
    )
    arguments.add_recipe(parser, "--recipe", default=None)
    _add_fast_arguments(parser)
    arguments.add_dry_run(parser)


def _add_fast_arguments(parser: Any) -> None:
    said = (
        "The fastest plan is searched that passes the gate against the exact engines' pictures: "
        "fewer steps at timesteps made for this model, guidance on some of them, shallow steps "
        "between, less attention in large images. Then --gate is the plan's (default: psnr=20); "
        "the demo has colour=N and retrieval=N too, how many points of a hundred may be lost. "
        "run follows the plan, and run --unaccelerated does not. Without such a plan engines stay exact."
    )
    group = parser.add_argument_group("another picture, faster", arguments.wrapped(said))
    group.add_argument("--fast", action="store_true", help="search a plan when all else is built")
    group.add_argument(
        "--effort", type=int, metavar="N", help="judge so many plans at most (default: 24)"
    )
    group.add_argument(
        "--network",
        metavar="FILE|NAME",
        help="tells how far pictures are apart, for the gate perceptual=N and the record: an ONNX "
        "file of feature maps, or efficientnet-lite0",
    )
    group.add_argument(
        "--retrieval",
        type=Path,
        metavar="DIR",
        help="for the gate of that name: unpacked npm package emoji-datasource-google 16.0.0",
    )


def _build(options: argparse.Namespace) -> None:
    if options.precision and options.recipe:
        raise SettingsError("--precision names a recipe too: give one of the two")
    make = _build_for_optimum if options.layout == "optimum" else _build_in_stages
    make(options, arguments.sizes_of(options))
    if options.dry_run:
        return
    try:
        verify_engines(options.engines)
    except DeviceError as error:
        print(f"--  not run on this machine: {error}")
    output.print_next_step(options.engines)


def _build_in_stages(options: argparse.Namespace, sizes: Sizes) -> None:
    from latentforge.build import build, estimate
    from latentforge.runtime.files import check_target

    output.quiet_libraries()
    how = arguments.recipe_of(options)
    what: dict[str, Any] = {
        "target": options.target,
        "recipe": options.recipe or options.precision or "fp32",
        "sizes": sizes,
        "fast": _fast(options, how),
    }
    if not options.dry_run:
        check_target(options.engines, overwrite=options.overwrite)
    said = "\n".join(estimate(options.checkpoint, **what))
    print(said, file=sys.stdout if options.dry_run else sys.stderr)
    if options.dry_run:
        return
    what |= {"options": options.option, "overwrite": options.overwrite, **how}
    _say_what_was_built(build(options.checkpoint, options.engines, **what, quiet=False))


def _fast(options: argparse.Namespace, how: dict[str, Any]) -> SearchRequest | None:
    """What is asked of the search, if there is to be one: the gate is taken from the recipe's."""
    from latentforge.optimize.search.search import SearchRequest

    asked = {name: getattr(options, name) for name in ("effort", "network", "retrieval")}
    given = {name: value for name, value in asked.items() if value is not None}
    if not options.fast:
        if given:
            raise SettingsError(f"--{next(iter(given))} is for the search of a plan: give --fast")
        return None
    gate, how["gate"] = how["gate"], []
    return SearchRequest(gate=gate, prompts=options.prompts, repeats=options.repeats, **given)


def _say_what_was_built(manifest: Manifest) -> None:
    """What the last stage did to graphs, and then what came of the search for a plan."""
    from latentforge.commands.describe import changes
    from latentforge.optimize.search.search import STAGES, summary_lines

    *_, last = (stage for stage in manifest.history if stage.name not in STAGES)
    print("\n".join(changes(last)))
    if manifest.history[-1] is not last:
        print("\n".join(summary_lines(manifest)))


def _build_for_optimum(options: argparse.Namespace, sizes: Sizes) -> None:
    from latentforge.build import dimensions

    fixed = dimensions(sizes)
    asked = options.recipe or options.precision or options.option or options.target != "cpu"
    several = len(sizes.asdict()) != sum(value is not None for value in vars(fixed).values())
    if asked or options.fast or options.dry_run or several:
        raise SettingsError(
            "--layout optimum keeps graphs as optimum knows them: give no recipe, target, option, "
            "--fast, --dry-run or several sizes, or leave it plain"
        )
    export_engines(options, fixed)
