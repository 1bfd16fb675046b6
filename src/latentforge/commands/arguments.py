"""Arguments shared by several commands, and their conversion to requests of the Python API."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentforge.runtime.errors import SettingsError

if TYPE_CHECKING:
    from latentforge.optimize.stage.request import OptimizeRequest
    from latentforge.runtime.settings import Request
    from latentforge.runtime.shapes import Range, Sizes

__all__ = [
    "TARGETS",
    "add_dry_run",
    "add_unaccelerated",
    "add_option",
    "add_recipe",
    "add_request",
    "add_result_files",
    "add_sizes",
    "add_stage",
    "add_table",
    "add_target",
    "add_threads",
    "command",
    "names",
    "optimize_request",
    "parse_duration",
    "parse_ranges",
    "request_of",
    "sizes_of",
    "unrecognized",
    "wrapped",
]

TARGETS = ("cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx")
"""Targets of optimize, repeated here so that help needs no graph library."""

_RENAMED: Mapping[str, str] = {"exact": "unaccelerated"}
"""Former names of options."""

_SIMILARITY = 0.7  # of difflib, from which an option counts as a typing mistake

_WIDTH = 79

_MAX_SIZE = 16_384  # pixels or rows

_UNITS: Mapping[str, int] = {"s": 1, "m": 60, "h": 3600}


def command(commands: Any, name: str, run: Any, summary: str, more: str = "") -> Any:
    """Add a subcommand; --debug is also accepted after its name."""
    description = textwrap.fill(f"{summary}. {more}".strip(), _WIDTH)
    parser = commands.add_parser(name, help=summary, description=description)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.set_defaults(command=run, parser=parser)
    return parser


def unrecognized(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """Return the message about arguments that a command does not have, with the nearest option."""
    message = f"unrecognized arguments: {' '.join(arguments)}"
    names = [name.lstrip("-") for action in parser._actions for name in action.option_strings]
    for argument in (text.partition("=")[0] for text in arguments if text.startswith("--")):
        name = _RENAMED.get(argument.lstrip("-"), argument.lstrip("-"))
        if nearest := get_close_matches(name, names, 1, _SIMILARITY):
            return f"{message}; did you mean --{nearest[0]}?"
    return f"{message}; see {parser.prog} --help"


def wrapped(text: str) -> str:
    """Return the description of an argument group, wrapped for its indent of two columns."""
    return textwrap.fill(text, _WIDTH - 2)


def add_table(parser: Any, title: str, rows: Mapping[str, str], advice: str = "") -> None:
    """Append a table of the available names to a command's help."""
    width = max(map(len, rows)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in rows.items()]
    parser.epilog = "\n".join([f"{title}:", *lines, *(["", advice] if advice else [])])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def names(text: str) -> tuple[str, ...]:
    """Split a list of names at commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_stage(parser: Any) -> None:
    """Add the source and target of a stage that starts from a checkpoint."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a diffusers directory, a hub id such as org/model (or org/model@revision), demo, or "
        "a directory exported by optimum-onnx, whose graphs are used unchanged",
    )
    parser.add_argument(
        "--layout",
        default="plain",
        choices=["plain", "optimum"],
        help="optimum: arrange the files so that optimum-onnx's pipelines can load the directory "
        "too, by from_pretrained(ENGINES, export=False) (default: plain)",
    )
    parser.add_argument(
        "--sampler",
        dest="default_sampler",
        metavar="NAME",
        help="default sampler of the engines, listed by run --help (default: the one that follows "
        "the checkpoint's scheduler; a scheduler that none follows is refused)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="where torch runs the checkpoint, which engines are compared with, in float32; these "
        "run on the CPU meanwhile (default: cpu)",
    )
    add_target(parser)


def add_target(parser: Any) -> None:
    """Add the directory to write, and the permission to replace it."""
    parser.add_argument("engines", type=Path, metavar="ENGINES", help="the directory to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing engine directory"
    )


def add_recipe(parser: Any, name: str, default: str | None) -> None:
    """Add a recipe under an option name, its gate, calibration and timing: optimize_request()."""
    shown = f" (default: {default})" if default else ""
    parser.add_argument(
        name,
        default=default,
        metavar="NAME|FILE",
        help=f"recipe of the optimization: a name, or a TOML file of your own{shown}",
    )
    parser.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="quality threshold in place of the recipe's, such as psnr=35; may be repeated",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts for the quality gate and the calibration, one per line",
    )
    parser.add_argument(
        "--calibrate",
        type=int,
        metavar="N",
        help="number of prompts to calibrate with (default: the recipe's)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="pairs of images to time before and after; 0 disables timing (default: 3, or 6 for a "
        "plan of build --fast)",
    )
    parser.add_argument(
        "--budget",
        default="15m",
        metavar="TIME",
        help="time to keep to, such as 90s, 15m or 2h, or none: gate, calibration and timing are "
        "made smaller until they fit, never what other options give (default: 15m)",
    )


def optimize_request(options: argparse.Namespace, recipe: str) -> OptimizeRequest:
    """Return the request of the arguments of add_recipe(), add_target() and --target."""
    from latentforge.measure.prompts import read_prompts
    from latentforge.optimize.stage.request import OptimizeRequest

    return OptimizeRequest(
        recipe=recipe,
        target=options.target,
        gate=tuple(options.gate),
        prompts=tuple(read_prompts(options.prompts)) if options.prompts else (),
        calibration_prompts=options.calibrate,
        repeats=options.repeats,
        budget=parse_duration(options.budget),
        overwrite=options.overwrite,
        quiet=False,
    )


def parse_duration(text: str) -> float | None:
    """Return the seconds of a duration in the command line's notation: ``90s``, ``15m``, ``2h``.

    Returns:
        None for ``none``, which sets no limit.

    Raises:
        SettingsError: the text has another form.
    """
    number, unit = text[:-1], _UNITS.get(text[-1:], 0)
    if text == "none":
        return None
    if not (number.isascii() and number.replace(".", "", 1).isdigit() and unit):
        raise SettingsError(f"a budget is a time such as 90s, 15m or 2h, or none, not {text!r}")
    return float(number[:20]) * unit


def add_sizes(parser: Any) -> None:
    """Add the sizes to build for: sizes_of()."""
    text = (
        "N for one size, N,N,... for several, MIN:OPT:MAX for a range; all combinations are "
        "built. Default: any size, or the model's own if the backend needs fixed sizes."
    )
    group = parser.add_argument_group("sizes", wrapped(text))
    for name in ("height", "width"):
        group.add_argument(f"--{name}", metavar="PIXELS", help=f"image {name}")
    group.add_argument(
        "--batch",
        metavar="ROWS",
        help="rows of one denoiser run; classifier-free guidance takes two per image",
    )


def sizes_of(options: argparse.Namespace) -> Sizes:
    """Return the sizes of the arguments of add_sizes()."""
    from latentforge.runtime.shapes import Sizes

    given = {name: getattr(options, name) for name in ("height", "width", "batch")}
    return Sizes(**{name: parse_ranges(text) for name, text in given.items() if text is not None})


def parse_ranges(text: str) -> tuple[Range, ...]:
    """Parse ranges in the command line's notation: ``512``, ``512,768`` or ``256:512:768``.

    Raises:
        SettingsError: the text has another form, or a size is not in 1..16384.
    """
    return tuple(_range(part.strip(), text) for part in text.split(","))


def _range(part: str, text: str) -> Range:
    from latentforge.runtime.shapes import Range

    sizes = part.split(":")
    if len(sizes) not in (1, 3) or not all(s.isascii() and s.isdigit() for s in sizes):
        raise SettingsError(f"sizes are N, N,N,... or MIN:OPT:MAX, not {text!r}")
    low, optimum, high = (int(size[:9]) for size in (sizes if len(sizes) == 3 else sizes * 3))
    if high > _MAX_SIZE:
        raise SettingsError(f"a size is at most {_MAX_SIZE}, but {text!r} has {high}")
    return Range(low, optimum, high)


def add_option(parser: Any) -> None:
    """Add options of backends."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="backend option, such as device=GPU or capabilities=8.6,8.9; may be repeated",
    )


def add_dry_run(parser: Any) -> None:
    """Add an option to print the plan only."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the steps with their memory and disk space, and do nothing",
    )


def add_request(parser: Any) -> None:
    """Add the settings of an image: request_of()."""
    add_denoising(parser)
    parser.add_argument(
        "--rescale",
        type=float,
        metavar="PHI",
        help="guidance rescale, 0 to 1: reduces the overexposure of a high guidance scale",
    )
    parser.add_argument("--height", type=int, metavar="PIXELS", help="height of the images")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="width of the images")


def add_denoising(parser: Any) -> None:
    """Add the settings of a denoising loop, some of those of request_of()."""
    parser.add_argument("--steps", type=int, metavar="N", help="number of denoising steps")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="scale of classifier-free guidance: how closely to follow the prompt; 1 is off",
    )
    parser.add_argument("--sampler", metavar="NAME", help="listed by run --help")


_SETTINGS: Mapping[str, str] = {
    "steps": "steps",
    "guidance": "guidance_scale",
    "rescale": "guidance_rescale",
    "image_guidance_scale": "image_guidance_scale",
    "noise_level": "noise_level",
    "sampler": "sampler",
    "height": "height",
    "width": "width",
    "negative": "negative_prompt",
    "seed": "seed",
    "images": "images_per_prompt",
    "strength": "strength",
    "unaccelerated": "unaccelerated",
    "guidance_interval": "guidance_interval",
    "cache_interval": "cache_interval",
}
"""Settings of the Python API by option."""


def request_of(options: argparse.Namespace) -> Request:
    """Return the settings that were given, by their names in the Python API."""
    values = {setting: getattr(options, name, None) for name, setting in _SETTINGS.items()}
    given = {setting: value for setting, value in values.items() if value is not None}
    return given  # type: ignore[return-value]


def add_threads(parser: Any) -> None:
    """Add the number of threads of engines."""
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="CPU threads (default: $LATENTFORGE_THREADS, or all cores)",
    )


def add_unaccelerated(parser: Any) -> None:
    """Add an option to ignore acceleration plans."""
    parser.add_argument(
        "--unaccelerated",
        action="store_true",
        default=None,
        help="ignore the acceleration plan that build --fast found",
    )


def add_result_files(parser: Any) -> None:
    """Add the result files, which output.emit_results() writes."""
    parser.add_argument(
        "--json", metavar="FILE", help="write the results as JSON; - for standard output"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the results as a page")
