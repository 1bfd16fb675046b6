"""latentforge run: generate images of prompts."""

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

_SHARED = ("steps", "sampler", "seed", "timesteps")  # settings that a refiner takes from the base

_OF_THE_BASE = ("image_guidance_scale", "noise_level")  # settings that a refiner lacks

_EXAMPLES = """examples:
  latentforge run engines "a red apple" -o apple.png
  latentforge run engines "a red apple" "an owl" --images 2 --seed 7 -o out.png
  latentforge run engines "a red apple" --sampler dpmpp_2m --steps 20 -o apple.png
  latentforge run engines "oil painting" --image photo.jpg --strength 0.6 -o out.png
  latentforge run engines "a hat" --image photo.jpg --mask head.png -o out.png
  latentforge run pix2pix "make it snow" --image photo.jpg --image-guidance-scale 1.5 -o out.png"""


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    from latentforge.runtime.sampling import SAMPLERS

    parser = arguments.command(
        commands,
        "run",
        _run,
        "Generate images of prompts, without torch",
        "Settings that are omitted come from the engines' acceleration plan, if build --fast found "
        "one, and from the defaults of the checkpoint. Each image stores its settings; the same "
        "settings and seed give the same image again.",
    )
    samplers = {name: sampler.summary for name, sampler in SAMPLERS.items()}
    arguments.add_table(parser, "samplers", samplers, _EXAMPLES)
    parser.add_argument(
        "engines", type=Path, metavar="ENGINES", help="engine directory, written by build"
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="one or several prompts")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="IMAGE",
        help="file to write: .png, .jpg or .webp; several images are numbered",
    )
    arguments.add_request(parser)
    parser.add_argument("--negative", metavar="TEXT", help="negative prompt: what to avoid")
    parser.add_argument(
        "--seed",
        type=_seeds,
        metavar="N",
        help="seed of the noise (default: random), as in diffusers; N,N,... gives each of several "
        "images its own",
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="number of images per prompt (default: 1)"
    )
    _add_acceleration_arguments(parser)
    _add_image_arguments(parser)
    arguments.add_threads(parser)
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="one row at a time and one copy of the weights: about half the memory, slower",
    )


def _add_acceleration_arguments(parser: Any) -> None:
    text = (
        "Ways to evaluate the denoiser less often, at the cost of another image. Engines of build "
        "--fast have a plan for this with measured quality; these options override it."
    )
    group = parser.add_argument_group("acceleration", arguments.wrapped(text))
    arguments.add_unaccelerated(group)
    group.add_argument(
        "--guidance-interval",
        type=_interval,
        metavar="LOW:HIGH",
        help="apply classifier-free guidance only at noise levels with sigma, the share of noise, "
        "between these, such as 0.2:0.9; other steps run one row per image instead of two",
    )
    group.add_argument(
        "--cache-interval",
        type=int,
        metavar="N",
        help="evaluate the whole denoiser only in every Nth step; the others reuse the cached "
        "feature of its deep blocks (DeepCache)",
    )


def _seeds(text: str) -> int | tuple[int, ...]:
    try:
        seeds = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected an integer, or one per image such as 1,2, not {text!r}"
        ) from None
    return seeds if "," in text else seeds[0]


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected LOW:HIGH such as 0.2:0.9, not {text!r}"
        ) from None
    return low, high


def _add_image_arguments(parser: Any) -> None:
    group = parser.add_argument_group(
        "image-to-image, inpainting, editing and enlarging",
        "The result has the size of the initial image, rounded down to what the model\n"
        "supports, unless --height and --width are given.",
    )
    group.add_argument("--image", type=Path, metavar="FILE", help="initial image")
    group.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="image of the same size: light where to paint, dark where to keep the initial image",
    )
    group.add_argument(
        "--depth-map",
        type=Path,
        metavar="FILE",
        help="depth map of the image, light where it is near, for models that take one",
    )
    group.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="amount of change, 0 to 1: the fraction of the steps that is run (default: 0.8, or 1 "
        "with a mask)",
    )
    group.add_argument(
        "--image-guidance-scale",
        type=float,
        metavar="SCALE",
        help="for models that edit an image: how closely to keep it, from 1, which is off",
    )
    group.add_argument(
        "--noise-level",
        type=int,
        metavar="N",
        help="for models that enlarge an image: amount of noise on it, from 0; more noise is more "
        "freedom",
    )
    group = parser.add_argument_group("refiner")
    group.add_argument(
        "--refiner",
        type=Path,
        metavar="ENGINES",
        help="engine directory of a second model that runs the last steps",
    )
    group.add_argument(
        "--refine-from",
        type=float,
        default=0.8,
        metavar="FRACTION",
        help="fraction of the schedule after which the refiner continues (default: 0.8)",
    )


def _run(options: argparse.Namespace) -> None:
    from latentforge.runtime.image import check_image_path, open_image, save_image

    check_image_path(options.output)
    images = {
        name: open_image(path)
        for name in ("image", "mask", "depth_map")
        if (path := getattr(options, name)) is not None
    }
    request: dict[str, Any] = {**arguments.request_of(options), **images}
    result = _refined(options, request) if options.refiner else _generated(options, request)
    for index, image in enumerate(result.images):
        prompt = result.settings.prompts[index // result.settings.images_per_prompt]
        path = _numbered(options.output, index, len(result.images))
        save_image(image, path, {**_metadata(result, index), "prompt": prompt, "index": index})
        print(path)
    print(f"seed {', '.join(map(str, result.settings.seeds))}, {result.timings}", file=sys.stderr)


def _generated(options: argparse.Namespace, request: dict[str, Any]) -> Result:
    return _last_step(options.engines, options, request, "denoising", lambda step: step.result())


def _refined(options: argparse.Namespace, request: dict[str, Any]) -> Result:
    """Run the base model's steps, then the refiner's, with one of them in memory at a time."""
    fraction = options.refine_from
    if not 0 < fraction < 1:
        raise SettingsError(f"--refine-from must be between 0 and 1, not {fraction:g}")
    first = {**request, "denoising_end": fraction}
    base = _last_step(options.engines, options, first, "denoising", lambda step: step)
    used = ("image", "mask", "depth_map", "strength", "height", "width", *_OF_THE_BASE)
    second = {name: value for name, value in request.items() if name not in used}
    second |= {name: getattr(base.settings, name) for name in _SHARED}
    second |= {"image": base.latents, "denoising_start": fraction}
    return _last_step(options.refiner, options, second, "refining", lambda step: step.result())


def _last_step(
    engines: Path,
    options: argparse.Namespace,
    request: dict[str, Any],
    label: str,
    finish: Callable[[DenoisingStep], T],
) -> T:
    """Run a request, and apply `finish` to its last step while the engines are loaded."""
    from latentforge.runtime.loader import load
    from latentforge.runtime.progress import Progress

    with load(engines, threads=options.threads, low_memory=options.low_memory) as pipeline:
        with Progress(1, quiet=False) as progress:
            for step in pipeline.stream(options.prompts, **request):
                progress.advance(label, total=step.count)
        return finish(step)


def _numbered(path: Path, index: int, count: int) -> Path:
    return path if count == 1 else path.with_stem(f"{path.stem}-{index + 1}")


def _metadata(result: Result, index: int) -> dict[str, Any]:
    """Return the settings of an image; with a seed per image its own, and the list as seeds."""
    from dataclasses import asdict

    settings = {"latentforge": __version__, **asdict(result.settings)}
    if isinstance(result.seed, tuple):
        settings |= {"seed": result.seed[index], "seeds": result.seed}
    return settings
