"""latentforge inspect: describe an engine directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output

__all__ = ["add"]

_MAX_LAYERS = 1_000_000


def add(commands: Any) -> None:
    parser = arguments.command(
        commands,
        "inspect",
        _inspect,
        "Describe an engine directory",
        "Prints sizes, precisions and signatures of all components, their error against torch, and "
        "the stages that made the directory.",
    )
    parser.add_argument("engines", type=Path, metavar="ENGINES")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="?",
        const=20,
        metavar="N",
        help="also run the engines, and list the N slowest layers (default: 20)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the manifest as JSON; - for standard output"
    )


def _inspect(options: argparse.Namespace) -> None:
    import msgspec

    from latentforge.commands.describe import describe
    from latentforge.runtime.files import check_file_target
    from latentforge.runtime.loader import load
    from latentforge.runtime.manifest import Manifest
    from latentforge.runtime.validation import check_optional_count

    if options.json and options.json != "-":
        check_file_target(Path(options.json))
    check_optional_count("--layers", options.layers, _MAX_LAYERS)
    manifest = Manifest.read(options.engines)
    data, text = msgspec.to_builtins(manifest), describe(manifest)
    if options.layers is not None:
        with load(options.engines, hashes=False) as pipeline:
            profile = pipeline.profile(sampler="euler", steps=2, unaccelerated=True)
        data["layers"] = [layer._asdict() for layer in profile.layers]
        text += f"\n\nslowest layers of an image of 2 steps\n{profile.top(options.layers)}"
    output.emit(data, options.json, text)
