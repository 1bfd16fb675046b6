"""Command ``latentforge export``: from a checkpoint to ONNX engines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.commands import arguments, output

if TYPE_CHECKING:
    from latentforge.export.onnx import Dimensions

__all__ = ["add", "export_engines"]


def add(commands: Any) -> None:
    """Add the command to the subparsers of the main parser."""
    parser = arguments.command(
        commands,
        "export",
        _export,
        "Export a checkpoint to ONNX engines, and compare each with torch",
        "Each component must reproduce torch's outputs, within a thousandth of the largest one, on "
        "inputs recorded from a denoising run, and their image must be that of diffusers' own "
        "pipeline. Needs pip install 'latentforge[cpu,export]'.",
    )
    arguments.add_stage(parser)
    for name in ("height", "width"):
        parser.add_argument(
            f"--{name}", type=int, metavar="PIXELS", help=f"fix the image's {name} (default: free)"
        )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="ROWS",
        help="fix the rows of one engine run; classifier-free guidance takes two rows per image, "
        "and larger batches are split into several runs (default: free)",
    )
    parser.add_argument(
        "--components",
        type=arguments.names,
        default=(),
        metavar="NAME,...",
        help="export these components only (default: all)",
    )


def _export(options: argparse.Namespace) -> None:
    from latentforge.export.onnx import Dimensions

    dimensions = Dimensions(batch=options.batch, height=options.height, width=options.width)
    export_engines(options, dimensions, tuple(options.components))
    _print_description(options.engines)


def export_engines(
    options: argparse.Namespace, dimensions: Dimensions, components: tuple[str, ...] = ()
) -> None:
    """Export with the checkpoint, target, layout and device that arguments.add_stage() parsed."""
    output.quiet_libraries()
    from latentforge.export.stage import ExportRequest, export

    request = ExportRequest(
        components=components,
        dimensions=dimensions,
        layout=options.layout,
        sampler=options.default_sampler,
        device=options.device,
        overwrite=options.overwrite,
        quiet=False,
    )
    export(options.checkpoint, options.engines, request)


def _print_description(engines: Path) -> None:
    from latentforge.commands.describe import describe
    from latentforge.runtime.manifest import Manifest

    print(describe(Manifest.read(engines, hashes=False)))
