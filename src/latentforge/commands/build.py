"""latentforge build: all stages from a checkpoint to engines, and a search for a plan."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.commands import arguments, output
from latentforge.commands.export import export_engines
from latentforge.commands.verify import verify_engines
from latentforge.runtime.errors import DeviceError, SettingsError

if TYPE_CHECKING:
    from latentforge.build import BuildRequest
    from latentforge.optimize.search.request import SearchRequest
    from latentforge.optimize.stage.request import OptimizeRequest
    from latentforge.runtime.manifest import Manifest
    from latentforge.runtime.shapes import Sizes

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = arguments.command(
        commands,
        "build",
        _build,
        "Build engines from a checkpoint, ready to run on this machine",
        "Exports the checkpoint, optimizes the graphs behind a quality gate, compiles them if the "
        "target needs it, and verifies the result. This is the command that most people need. "
        "Needs pip install 'latentforge[cpu,export]'.",
    )
    arguments.add_stage(parser)
    arguments.add_sizes(parser)
    parser.add_argument(
        "--target",
        default="cpu",
        choices=[*arguments.TARGETS, "auto"],
        help="backend that will run the engines; auto measures the ones that this machine can run "
        "and takes the fastest for each component (default: cpu)",
    )
    arguments.add_option(parser)
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "bf16", "int8", "auto"],
        help="use the recipe of this name; auto takes the fastest on this machine that passes its "
        "gate (default: fp32)",
    )
    arguments.add_recipe(parser, "--recipe", default=None)
    _add_search_arguments(parser)
    arguments.add_dry_run(parser)


def _add_search_arguments(parser: Any) -> None:
    text = (
        "Searches for the fastest acceleration plan whose images pass a gate: fewer steps at "
        "timesteps chosen for this model, guidance on some of the steps, cached steps between full "
        "ones, and cheaper attention in large images. Images then differ from those of the "
        "unaccelerated engines (class B). The plan is selected on one set of prompts and seeds, "
        "confirmed on a second, and reported on a third; it is kept only if it is certainly "
        "faster. --gate is then the gate of the plan (default: psnr=20); for the demo also "
        "colour=N and retrieval=N, the percentage points that this accuracy may lose. run follows "
        "the plan unless --unaccelerated is given."
    )
    group = parser.add_argument_group("different images, faster", arguments.wrapped(text))
    group.add_argument("--fast", action="store_true", help="search for an acceleration plan")
    group.add_argument(
        "--effort",
        type=int,
        metavar="N",
        help="number of plans whose images are judged, at most (default: 24)",
    )
    group.add_argument(
        "--network",
        metavar="FILE|NAME",
        help="network of the perceptual distance, for the gate perceptual=N and the record: an "
        "ONNX file of feature maps, or efficientnet-lite0",
    )
    group.add_argument(
        "--retrieval",
        type=Path,
        metavar="DIR",
        help="training images of the demo, for the gate retrieval=N: the unpacked npm package "
        "emoji-datasource-google 16.0.0",
    )


def _build(options: argparse.Namespace) -> None:
    if options.precision and options.recipe:
        raise SettingsError("--precision also names a recipe: give only one of the two")
    run = _build_for_optimum if options.layout == "optimum" else _build_in_stages
    run(options, arguments.sizes_of(options))
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
    request = _request(options, sizes)
    if not options.dry_run:
        check_target(options.engines, overwrite=options.overwrite)
    plan = estimate(options.checkpoint, request)
    print(plan, file=sys.stdout if options.dry_run else sys.stderr)
    if not options.dry_run:
        _print_result(build(options.checkpoint, options.engines, request, plan=plan))


def _request(options: argparse.Namespace, sizes: Sizes) -> BuildRequest:
    """Return the request; with --fast its gate is the plan's, not the recipe's."""
    from latentforge.build import BuildRequest

    recipe = options.recipe or options.precision or "fp32"
    optimization = arguments.optimize_request(options, recipe)
    search = _search_request(options, optimization)
    return BuildRequest(
        optimization=replace(optimization, gate=()) if search else optimization,
        sampler=options.default_sampler,
        sizes=sizes,
        options=tuple(options.option),
        search=search,
        device=options.device,
    )


def _search_request(
    options: argparse.Namespace, optimization: OptimizeRequest
) -> SearchRequest | None:
    """Return the request of --fast; None without it."""
    from latentforge.build import with_demo_metrics
    from latentforge.optimize.search.request import SearchRequest

    values = {name: getattr(options, name) for name in ("effort", "network", "retrieval")}
    given = {name: value for name, value in values.items() if value is not None}
    if not options.fast:
        if given:
            raise SettingsError(f"--{next(iter(given))} is for the search of a plan: add --fast")
        return None
    training_images = given.pop("retrieval", None)
    if options.repeats is not None:
        given["repeats"] = options.repeats
    request = SearchRequest(
        gate=optimization.gate,
        prompts=optimization.prompts,
        **given,
    )
    return with_demo_metrics(options.checkpoint, request, training_images)


def _print_result(manifest: Manifest) -> None:
    """Print what the last stage changed in the graphs, the outcome of the search, and the cost."""
    from latentforge.build import STAGE
    from latentforge.commands.describe import stage_lines
    from latentforge.optimize.search.search import STAGES, summary_lines

    *stages, build = manifest.history
    assert build.name == STAGE
    *_, last = (stage for stage in stages if stage.name not in STAGES)
    print("\n".join(stage_lines(last)))
    if stages[-1] is not last:
        print("\n".join(summary_lines(manifest)))
    print("\n".join(stage_lines(build)))


def _build_for_optimum(options: argparse.Namespace, sizes: Sizes) -> None:
    from latentforge.build import dimensions

    fixed = dimensions(sizes)
    given = options.recipe or options.precision or options.option or options.target != "cpu"
    several = len(sizes.asdict()) != sum(value is not None for value in vars(fixed).values())
    if given or options.fast or options.dry_run or several:
        raise SettingsError(
            "--layout optimum keeps the graphs as optimum needs them: give no recipe, precision, "
            "target, option, --fast, --dry-run or several sizes, or leave out --layout"
        )
    export_engines(options, fixed)
