"""Arguments that several commands take, and what those say as settings of the Python API."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentforge.runtime.settings import Request
    from latentforge.runtime.shapes import Sizes

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
    "recipe_of",
    "request_of",
    "sizes_of",
    "wrapped",
]

TARGETS = ("cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx")
"""What optimize can make engines for, written out so that help needs no graph library."""

_WIDTH = 79


def command(commands: Any, name: str, run: Any, summary: str, more: str = "") -> Any:
    """A sub-command, with --debug accepted after its name too."""
    description = textwrap.fill(f"{summary}. {more}".strip(), _WIDTH)
    parser = commands.add_parser(name, help=summary, description=description)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.set_defaults(command=run)
    return parser


def wrapped(text: str) -> str:
    """The description of a group of arguments, which stands two columns in."""
    return textwrap.fill(text, _WIDTH - 2)


def add_table(parser: Any, title: str, rows: Mapping[str, str], advice: str = "") -> None:
    """What there is to choose from, at the end of a command's help."""
    width = max(map(len, rows)) + 2
    lines = [f"  {name:<{width}}{said}" for name, said in rows.items()]
    parser.epilog = "\n".join([f"{title}:", *lines, *(["", advice] if advice else [])])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def names(text: str) -> tuple[str, ...]:
    """What a list with commas names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_stage(parser: Any) -> None:
    """What is read and what is written, of stages that begin with a checkpoint."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a diffusers directory, a hub id such as org/model (or org/model@revision), demo, or "
        "a directory that optimum-onnx exported, whose graphs are taken as they are",
    )
    parser.add_argument(
        "--layout",
        default="plain",
        choices=["plain", "optimum"],
        help="optimum: arrange the engines so that optimum-onnx's pipelines load the directory "
        "too, with from_pretrained(ENGINES, export=False) (default: plain)",
    )
    add_target(parser)


def add_target(parser: Any) -> None:
    """What is written, and leave to replace what is there."""
    parser.add_argument("engines", type=Path, metavar="ENGINES", help="the directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an engine directory")


def add_recipe(parser: Any, name: str, default: str | None) -> None:
    """A recipe under a name, its gate and calibration; recipe_of() reads the latter."""
    said = f" (default: {default})" if default else ""
    parser.add_argument(
        name, default=default, metavar="NAME|FILE", help=f"what to do; a TOML file of yours{said}"
    )
    parser.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a threshold in place of the recipe's, such as psnr=35; may be repeated",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="for gate and calibration, one a line"
    )
    parser.add_argument(
        "--calibrate", type=int, metavar="N", help="prompts to calibrate with (default: recipe's)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="pairs of images to time against the input; 0 for none (default: 3)",
    )


def recipe_of(options: argparse.Namespace) -> dict[str, Any]:
    """What optimize() takes beside the recipe itself."""
    return {name: getattr(options, name) for name in ("gate", "prompts", "calibrate", "repeats")}


def add_sizes(parser: Any) -> None:
    """The sizes that are built for; sizes_of() reads them."""
    said = (
        "N for one size alone, N,N,... for several, MIN:OPT:MAX for a range; all "
        "combinations are built for. Default: any, or the model's own where a backend has to know."
    )
    group = parser.add_argument_group("sizes", wrapped(said))
    for name in ("height", "width"):
        group.add_argument(f"--{name}", metavar="PIXELS", help=f"{name}s of images")
    group.add_argument(
        "--batch", metavar="ROWS", help="rows of one UNet run; guidance takes two an image"
    )


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The sizes that were given, which may be ranges or several."""
    from latentforge.runtime.shapes import Sizes, parse_ranges

    given = {name: getattr(options, name) for name in ("height", "width", "batch")}
    return Sizes(**{name: parse_ranges(text) for name, text in given.items() if text is not None})


def add_option(parser: Any) -> None:
    """Options of backends."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of a backend, such as device=GPU or capabilities=8.6,8.9; may be repeated",
    )


def add_dry_run(parser: Any) -> None:
    """Leave to only say it."""
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be done, and what it takes"
    )


def add_request(parser: Any) -> None:
    """What every image is asked for with; request_of() reads it."""
    parser.add_argument("--steps", type=int, metavar="N", help="of denoising")
    parser.add_argument(
        "--guidance", type=float, metavar="SCALE", help="how closely to follow the prompt; 1 is off"
    )
    parser.add_argument("--rescale", type=float, metavar="PHI", help="guidance rescale, 0 to 1")
    parser.add_argument("--sampler", metavar="NAME", help="the list is in run --help")
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument("--width", type=int, metavar="PIXELS")


def request_of(options: argparse.Namespace) -> Request:
    """The settings that were given, under the names that the Python API has for them."""
    called = {
        "steps": "steps",
        "guidance": "guidance_scale",
        "rescale": "guidance_rescale",
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
    given = {ours: getattr(options, name, None) for name, ours in called.items()}
    return {key: value for key, value in given.items() if value is not None}  # type: ignore[return-value]


def add_threads(parser: Any) -> None:
    """Threads of engines."""
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: every core")


def add_unaccelerated(parser: Any) -> None:
    """Leave to draw as the engines did before a plan was found."""
    parser.add_argument(
        "--unaccelerated",
        action="store_true",
        default=None,
        help="leave aside the plans of build --fast",
    )


def add_result_files(parser: Any) -> None:
    """Where figures go; output.emit_results() writes them."""
    parser.add_argument("--json", metavar="FILE", help="the figures as JSON; - for standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the figures as a page")
