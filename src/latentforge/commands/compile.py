"""latentforge compile: native engines of graphs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentforge.commands import arguments, output
from latentforge.runtime.errors import SettingsError

__all__ = ["add"]


def add(commands: Any) -> None:
    from latentforge.runtime.backends import BACKENDS

    parser = arguments.command(
        commands,
        "compile",
        _compile,
        "Build native engines of graphs, and compare a picture of both",
        "Each engine is built in a process of its own, so that running out of memory costs "
        "nothing else. What needs a GPU to run and finds none is built where that is possible.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="what optimize or export wrote")
    arguments.add_target(parser)
    parser.add_argument(
        "--backend",
        action="append",
        required=True,
        metavar="NAME",
        help="what will run them; COMPONENT=NAME for one of them, such as vae_decoder=onnxruntime",
    )
    arguments.add_option(parser)
    arguments.add_sizes(parser)
    arguments.add_dry_run(parser)
    rows = {name: f"pip install 'latentforge[{each.extra}]'" for name, each in BACKENDS.items()}
    advice = "an --option that is not there is refused with the list of those that are"
    arguments.add_table(parser, "backends", rows, advice)


def _compile(options: argparse.Namespace) -> None:
    from latentforge.runtime.compile.stage import compile_engines, plan

    usual = [text for text in options.backend if "=" not in text]
    if len(usual) != 1:
        raise SettingsError(
            "give one --backend NAME for all, and --backend COMPONENT=NAME for others"
        )
    others = dict(text.split("=", 1) for text in options.backend if "=" in text)
    what = {
        "backend": usual[0],
        "others": others,
        "options": options.option,
        "sizes": arguments.sizes_of(options),
    }
    if options.dry_run:
        print(plan(options.source, **what))
        return
    manifest = compile_engines(
        options.source, options.engines, **what, overwrite=options.overwrite, quiet=False
    )
    output.print_changes(manifest)
    output.print_next_step(options.engines)
