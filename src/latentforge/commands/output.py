"""Output of the commands: text, JSON and HTML files."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from latentforge.runtime.errors import TargetError
from latentforge.runtime.text import printable

if TYPE_CHECKING:
    from latentforge.measure.results import Results
    from latentforge.runtime.manifest import Manifest

__all__ = [
    "check_result_files",
    "EscapedStream",
    "command_line",
    "emit",
    "emit_results",
    "escaped_output",
    "print_changes",
    "print_next_step",
    "quiet_libraries",
    "write_text",
]


class EscapedStream:
    """Text stream that escapes what would control a terminal, and never fails to encode.

    Texts of files and messages of libraries are printed: control characters of C0 and C1, changes
    of direction, invisible characters and lone surrogates appear as escapes; line ends stay.

    Attributes:
        unescaped: the stream that it writes to.
        name: of the stream in messages; empty if what cannot be written is dropped.
    """

    def __init__(self, stream: TextIO | None, name: str = "") -> None:
        self.unescaped = stream or open(os.devnull, "w")  # None: it was closed
        self.name = name

    def write(self, text: str) -> int:
        """Write a text, escaped."""
        encoding = self.unescaped.encoding or "utf-8"
        shown = "\n".join(map(_tabbed, text.split("\n")))
        with self._errors():
            self.unescaped.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._errors():
            self.unescaped.flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Drop the rest of the output where it cannot be written.

        Raises TargetError if the stream has a name.
        """
        try:
            yield
        except OSError as error:
            with suppress(OSError, ValueError):  # as Python would fail again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.unescaped.fileno())
            if self.name:
                raise TargetError(f"cannot write {self.name}: {error.strerror}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def _tabbed(line: str) -> str:
    return "\t".join(map(printable, line.split("\t")))


@contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is printed to standard output and standard error while the block runs."""
    output, errors = EscapedStream(sys.stdout, "standard output"), EscapedStream(sys.stderr)
    with redirect_stdout(output), redirect_stderr(errors):
        yield


def quiet_libraries() -> None:
    """Silence advice and progress bars of other libraries; their errors still appear."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    from latentforge.runtime.files import staged_file

    with staged_file(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def emit(data: Any, destination: str | None, text: str) -> None:
    """Print text, and write data as JSON to a file; for ``-``, print the JSON alone."""
    if destination == "-":
        json.dump(data, sys.stdout, indent=2)
        print()
        return
    if destination:
        write_text(destination, json.dumps(data, indent=2) + "\n")
    print(text)


def check_result_files(options: argparse.Namespace) -> None:
    """Check that the files of --json and --html can be written.

    Raises:
        TargetError: one of them cannot.
    """
    from latentforge.runtime.files import check_file_target

    for path in (options.json, options.html):
        if path and path != "-":
            check_file_target(Path(path))


def emit_results(results: Results, options: argparse.Namespace, text: str) -> None:
    """Write the files of --json and --html, and print the text, or the JSON alone for ``-``."""
    if options.html:
        from latentforge.measure.report import render

        write_text(options.html, render(results))
    if options.json == "-":
        print(json.dumps(json.loads(results.encode()), indent=1))
        return
    if options.json:
        results.write(Path(options.json))
    print(text)


def command_line() -> str:
    """Return the current command line, for records that say how to repeat them."""
    return shlex.join(["latentforge", *sys.argv[1:]])


def print_next_step(engines: Path) -> None:
    """Print the command that generates an image with the engines."""
    from latentforge.runtime.manifest import Manifest

    conditioning = Manifest.read(engines, hashes=False).conditioning
    image = " --image photo.jpg" if conditioning.requires_image else ""
    depth = " --depth-map depth.png" if "depth" in conditioning.channels else ""
    print(f'\nnext: latentforge run {engines} "a prompt of yours"{image}{depth} -o image.png')


def print_changes(manifest: Manifest) -> None:
    """Print what the last stage changed in the graphs."""
    from latentforge.commands.describe import stage_lines

    print("\n".join(stage_lines(manifest.history[-1])))
