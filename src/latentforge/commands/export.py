"""latentforge export: a checkpoint as ONNX engines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.commands import arguments, output

if TYPE_CHECKING:
    from latentforge.export.onnx import Dimensions

__all__ = ["add", "export_engines"]


def add(commands: Any) -> None:
    parser = arguments.command(
        commands,
        "export",
        _export,
        "Turn a checkpoint into ONNX engines, each compared with torch",
        "Each component must give torch's outputs, within a thousandth of the largest, on "
        "inputs recorded from a denoising run. Needs pip install 'latentforge[cpu,export]'.",
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
        help="fix the rows of one engine run; guidance takes two rows an image, and what does "
        "not fit runs in parts (default: free)",
    )
    parser.add_argument(
        "--components",
        type=arguments.names,
        default=(),
        metavar="NAME,...",
        help="only these (default all)",
    )


def _export(options: argparse.Namespace) -> None:
    from latentforge.export.onnx import Dimensions

    fixed = Dimensions(batch=options.batch, height=options.height, width=options.width)
    export_engines(options, options.components, fixed)
    _inspect_plainly(options.engines)


def export_engines(
    options: argparse.Namespace, components: Sequence[str], dimensions: Dimensions
) -> None:
    """Export as the arguments of add_stage() say."""
    output.quiet_libraries()
    from latentforge.export.stage import export

    export(
        options.checkpoint,
        options.engines,
        components=components,
        dimensions=dimensions,
        layout=options.layout,
        overwrite=options.overwrite,
        quiet=False,
    )


def _inspect_plainly(engines: Path) -> None:
    from latentforge.commands.describe import describe
    from latentforge.runtime.manifest import Manifest

    print(describe(Manifest.read(engines, hashes=False)))
