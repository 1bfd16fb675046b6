"""latentforge run: images of prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from latentforge import __version__
from latentforge.commands import arguments
from latentforge.runtime.errors import SettingsError

if TYPE_CHECKING:
    from latentforge.runtime.pipeline import DenoisingStep, Result

__all__ = ["add"]

T = TypeVar("T")

_HANDED_ON = ("steps", "sampler", "seed", "timesteps")  # what a base and its refiner share


def add(commands: Any) -> None:
    from latentforge.runtime.sampling import SAMPLERS

    parser = arguments.command(
        commands,
        "run",
        _run,
        "Make images of prompts, without torch",
        "What is not given comes from the engines' manifest.",
    )
    arguments.add_table(parser, "samplers", {name: each.summary for name, each in SAMPLERS.items()})
    parser.add_argument("engines", type=Path, metavar="ENGINES", help="what build wrote")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="one or more")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="IMAGE",
        help="a .png, .jpg or .webp file; several images are numbered",
    )
    arguments.add_request(parser)
    parser.add_argument("--negative", metavar="TEXT", help="what not to paint")
    parser.add_argument("--seed", type=int, help="the same seed gives the same image as diffusers")
    parser.add_argument("--images", type=int, metavar="N", help="for each prompt (default: 1)")
    _add_plan_arguments(parser)
    _add_picture_arguments(parser)
    arguments.add_threads(parser)
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="one row at a time and no second copy of the weights: about half the memory, slower",
    )


def _add_plan_arguments(parser: Any) -> None:
    said = (
        "Engines of build --fast bring a plan for this, which is followed unless the image is to "
        "be exact. What is given here takes the place of the plan's."
    )
    group = parser.add_argument_group("doing less for an image", arguments.wrapped(said))
    arguments.add_unaccelerated(group)
    group.add_argument(
        "--guidance-interval",
        type=_interval,
        metavar="LOW:HIGH",
        help="guidance only where the share of noise, 0 to 1, lies between these",
    )
    group.add_argument(
        "--cache-interval",
        type=int,
        metavar="N",
        help="make only every Nth evaluation whole; the others go on from its deep layers",
    )


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"LOW:HIGH, such as 0.2:0.9, not {text!r}") from None
    return low, high


def _add_picture_arguments(parser: Any) -> None:
    group = parser.add_argument_group(
        "starting from a picture",
        "Its size becomes the image's, cut to what the model can do, unless --height and --width "
        "say otherwise.",
    )
    group.add_argument("--image", type=Path, metavar="FILE", help="the picture to start from")
    group.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="of the same size: light where to paint, dark what to keep",
    )
    group.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="how much to change, up to 1 (default: 0.8, and 1 with a mask)",
    )
    group = parser.add_argument_group("handing over to a refiner")
    group.add_argument(
        "--refiner", type=Path, metavar="ENGINES", help="engines that do the last steps"
    )
    group.add_argument(
        "--refine-from",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="of the way at which it takes over (default: 0.8)",
    )


def _run(options: argparse.Namespace) -> None:
    from latentforge.runtime.image import check_image_path, open_image, save_image

    check_image_path(options.output)
    given = {
        name: open_image(path)
        for name, path in (("image", options.image), ("mask", options.mask))
        if path is not None
    }
    request: dict[str, Any] = {**arguments.request_of(options), **given}
    result = _refined(options, request) if options.refiner else _painted(options, request)
    for index, image in enumerate(result.images):
        prompt = result.settings.prompts[index // result.settings.images_per_prompt]
        path = _numbered(options.output, index, len(result.images))
        save_image(image, path, {**_plain(result.settings), "prompt": prompt, "index": index})
        print(path)
    print(f"seed {result.seed}, {result.timings}", file=sys.stderr)


def _painted(options: argparse.Namespace, request: dict[str, Any]) -> Result:
    return _finished(options.engines, options, request, "denoising", lambda step: step.result())


def _refined(options: argparse.Namespace, request: dict[str, Any]) -> Result:
    """The base's part of the steps, then the refiner's; one of them is in memory at a time."""
    share = options.refine_from
    if not 0 < share < 1:
        raise SettingsError(f"--refine-from lies between 0 and 1, not {share:g}")
    first = {**request, "denoising_end": share}
    base = _finished(options.engines, options, first, "denoising", lambda step: step)
    spent = ("image", "mask", "strength", "height", "width")
    second = {name: value for name, value in request.items() if name not in spent}
    second |= {name: getattr(base.settings, name) for name in _HANDED_ON}
    second |= {"image": base.latents, "denoising_start": share}
    return _finished(options.refiner, options, second, "refining", lambda step: step.result())


def _finished(
    engines: Path,
    options: argparse.Namespace,
    request: dict[str, Any],
    what: str,
    finish: Callable[[DenoisingStep], T],
) -> T:
    """Run a request to its last step, and make of that what is wanted while engines are loaded."""
    from latentforge.runtime.loader import load
    from latentforge.runtime.progress import Progress

    with load(engines, threads=options.threads, low_memory=options.low_memory) as pipeline:
        with Progress(1, quiet=False) as progress:
            for step in pipeline.stream(options.prompts, **request):
                progress.advance(what, total=step.count)
        return finish(step)


def _numbered(path: Path, index: int, count: int) -> Path:
    return path if count == 1 else path.with_stem(f"{path.stem}-{index + 1}")


def _plain(settings: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {"latentforge": __version__, **asdict(settings)}
