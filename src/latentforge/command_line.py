"""Command line, whose commands are the modules of latentforge.commands."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, TextIO

from latentforge import __version__
from latentforge.commands import COMMANDS
from latentforge.commands.arguments import unrecognized
from latentforge.commands.output import escaped_output
from latentforge.compiler_cache import private_compiler_cache
from latentforge.runtime.errors import GateError, LatentforgeError, SettingsError
from latentforge.runtime.text import one_line, printable

__all__ = ["parser", "run"]

_OF_SERVE = (
    "httptools", "multipart", "prometheus_client", "python_multipart", "starlette", "uvicorn"
)  # fmt: skip
"""Packages of the extra ``serve``."""

_EXTRAS = {**dict.fromkeys(_OF_SERVE, "serve"), "scipy": "train", "tensorboard": "train"}
"""Extra that brings a package, where it is not ``export``."""

EPILOG = """\
first steps:
  latentforge demo                                    try everything on the demo checkpoint
  latentforge build stable-diffusion-v1-5/stable-diffusion-v1-5 engines/
  latentforge run engines/ "a red apple" -o apple.png
  latentforge build CHECKPOINT small/ --precision int8    or fp16, or auto for the fastest

exit status: 0 success; 2 wrong usage or input, explained in one line; 3 a quality gate failed
and the result was kept as TARGET.rejected, or compare found a regression; 130 interrupted,
by Ctrl-C or SIGTERM, without leaving files behind
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    with escaped_output(), private_compiler_cache():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    options, unknown = parser().parse_known_args(arguments)
    if unknown:
        options.parser.error(unrecognized(options.parser, unknown))
    _log_to(sys.stderr)
    if options.debug:
        logging.getLogger("latentforge").setLevel(logging.DEBUG)
    try:
        options.command(options)
        sys.stdout.flush()
        return 0
    except (LatentforgeError, OSError, MemoryError, ImportError) as error:
        if interrupt := _interrupt_behind(error):
            raise interrupt from None
        if options.debug:
            traceback.print_exc()
            return 1
        print(f"latentforge: {_explained(error)}", file=sys.stderr)
        return 3 if isinstance(error, GateError) else 2


class _OneLine(logging.Formatter):
    """Formatter of messages that quote files and libraries."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(one_line(super().format(record), limit=None))


def _log_to(stream: TextIO) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_OneLine("latentforge: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the interrupt that a library has turned into an error, such as an ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _explained(error: BaseException) -> str:
    """One line on an error, ours or the system's."""
    if isinstance(error, MemoryError):
        return "out of memory: close other programs, or use a smaller size or batch"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = f" at {error.filename}" if error.filename else ""
        return f"the disk is full{place}: make room, or name another place"
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(str(error.name).partition(".")[0], "export")
        return f"{error}: pip install 'latentforge[{extra}]' brings it, or [eval] what eval needs"
    return printable(one_line(error, limit=None))


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one short line, whatever the value that was wrong."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where the options are listed, and exit with status 2."""
        hint = "" if "--help" in message else f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: error: {SettingsError(message)}{hint}\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    whole = _Parser(
        prog="latentforge",
        description="Turn a text-to-image latent diffusion checkpoint into optimized engines, "
        "and make images with them without torch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"latentforge {__version__}")
    whole.add_argument(
        "--debug",
        action="store_true",
        help="show the traceback of an error, and what each pass of optimize rewrote and declined",
    )
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"latentforge.commands.{name}").add(commands)
    return whole
