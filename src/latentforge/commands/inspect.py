"""latentforge inspect: what is in an engine directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output

__all__ = ["add"]


def add(commands: Any) -> None:
    parser = arguments.command(
        commands,
        "inspect",
        _inspect,
        "Say what is in an engine directory",
        "Sizes, precisions, signatures, how close each engine is to torch, and its history.",
    )
    parser.add_argument("engines", type=Path, metavar="ENGINES")
    parser.add_argument(
        "--layers", type=int, nargs="?", const=20, metavar="N", help="run it, and list the hottest"
    )
    parser.add_argument("--json", metavar="FILE", help="the same as JSON; - for standard output")


def _inspect(options: argparse.Namespace) -> None:
    import msgspec

    from latentforge.commands.describe import describe
    from latentforge.runtime.loader import load
    from latentforge.runtime.manifest import Manifest

    manifest = Manifest.read(options.engines)
    data, text = msgspec.to_builtins(manifest), describe(manifest)
    if options.layers is not None:
        with load(options.engines, hashes=False) as pipeline:
            profile = pipeline.profile(sampler="euler", steps=2, unaccelerated=True)
        data["layers"] = [layer._asdict() for layer in profile.layers]
        text += f"\n\nhottest layers of an image of 2 steps\n{profile.top(options.layers)}"
    output.emit(data, options.json, text)
