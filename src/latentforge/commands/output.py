"""What commands say and write."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.runtime.errors import TargetError

if TYPE_CHECKING:
    from latentforge.measure.results import Results
    from latentforge.runtime.manifest import Manifest

__all__ = [
    "called",
    "check_result_files",
    "check_writable",
    "emit",
    "emit_results",
    "quiet_libraries",
    "say_what_changed",
    "say_what_is_next",
    "write_text",
]


def quiet_libraries() -> None:
    """Keep other libraries' advice and bars off the screen; their errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def check_writable(*paths: str | Path) -> None:
    """Before long work, that what it gives can be written."""
    for path in map(Path, paths):
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise TargetError(f"cannot write {path}: no such directory, or it is one itself")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all."""
    from latentforge.runtime.files import staged_file

    with staged_file(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def emit(data: Any, destination: str | None, text: str) -> None:
    """Print for people, or write for programs: with -, nothing else is on standard output."""
    if destination == "-":
        json.dump(data, sys.stdout, indent=2)
        print()
        return
    if destination:
        write_text(destination, json.dumps(data, indent=2) + "\n")
    print(text)


def check_result_files(options: argparse.Namespace) -> None:
    """The same for what bench and eval write."""
    check_writable(*(path for path in (options.json, options.html) if path and path != "-"))


def emit_results(results: Results, options: argparse.Namespace, text: str) -> None:
    """Draw, write and print what was measured, as the options ask."""
    if options.html:
        from latentforge.measure.report import render

        write_text(options.html, render(results))
    if options.json == "-":
        print(results.encode().decode(), end="")
        return
    if options.json:
        results.write(Path(options.json))
    print(text)


def called() -> str:
    """The command, for those who want to repeat it."""
    return shlex.join(["latentforge", *sys.argv[1:]])


def say_what_is_next(engines: Path) -> None:
    """The command that one goes on with."""
    print(f'\nnext: latentforge run {engines} "a prompt of yours" -o image.png')


def say_what_changed(manifest: Manifest) -> None:
    """What the last stage did to the graphs."""
    from latentforge.commands.describe import changes

    print("\n".join(changes(manifest.history[-1])))
