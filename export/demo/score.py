"""Accuracy of generated images of the demo: background color and named subject.

``score`` takes images from any source; the command generates them with diffusers first. torch is
needed for that only.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from latentforge.export.demo import CHECKPOINT, COLORS, GUIDANCE, NAMES, prompts
from latentforge.export.demo.data import SIZE, pictures

__all__ = ["COLOR_TARGET", "NAME_TARGET", "Scores", "border", "draw", "main", "parse", "score"]
__all__ += ["sheet"]

COLOR_TARGET, NAME_TARGET = 0.97, 0.80
"""Accuracies that the published checkpoint has to reach."""

_BATCH = 25


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracies of generated images.

    Attributes:
        count: number of images.
        colors: number of images with the named background color.
        names: number of images with the named subject.
    """

    count: int
    colors: int
    names: int

    @property
    def color(self) -> float:
        """Share of images whose border has the named color."""
        return self.colors / self.count

    @property
    def name(self) -> float:
        """Share of images whose nearest training image on that color is of the named subject."""
        return self.names / self.count

    @property
    def met(self) -> bool:
        """True if both targets are reached."""
        return self.color >= COLOR_TARGET and self.name >= NAME_TARGET

    def __str__(self) -> str:
        """Format both accuracies with their targets."""
        return (
            f"colour correct: {self.colors} of {self.count} = {self.color:.1%} "
            f"(target {COLOR_TARGET:.0%})\n"
            f"name correct: {self.names} of {self.count} = {self.name:.1%} "
            f"(target {NAME_TARGET:.0%})"
        )


def parse(prompt: str) -> tuple[int, int]:
    """Return the indices of name and color in a prompt "NAME on a COLOR background".

    Raises:
        ValueError: the prompt has another form.
    """
    match = re.fullmatch(r"(.+) on a (\w+) background", prompt)
    if match is None or match[1] not in NAMES or match[2] not in COLORS:
        raise ValueError(f"expected a prompt NAME on a COLOR background, not {prompt!r}")
    return NAMES.index(match[1]), list(COLORS).index(match[2])


def _pixels(image: Image.Image) -> npt.NDArray[np.float32]:
    """Return an image as (SIZE, SIZE, 3) in 0..255."""
    small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def border(image: Image.Image) -> int:
    """Return the index of the color that is nearest to the median of the two outer pixel rows."""
    pixels = _pixels(image)
    outside = np.ones((SIZE, SIZE), dtype=bool)
    outside[2:-2, 2:-2] = False
    # The median ignores subjects that touch the border.
    median = np.median(pixels[outside], axis=0)
    colors = np.array(list(COLORS.values()), dtype=np.float32)
    return int(np.square(colors - median).sum(axis=1).argmin())


def score(
    images: Sequence[Image.Image], prompts: Sequence[str], pictures: npt.NDArray[np.uint8]
) -> Scores:
    """Score images against their prompts.

    A name is correct if, among all training images on the named color, the image of the named
    subject is nearest by pixel distance (L2 over RGB).

    Args:
        images: the generated images.
        prompts: the prompt of each image.
        pictures: training images of data.pictures().
    """
    colors = names = 0
    for image, prompt in zip(images, prompts, strict=True):
        name, color = parse(prompt)
        colors += border(image) == color
        distances = np.square(pictures[:, color].astype(np.float32) - _pixels(image))
        names += int(distances.sum(axis=(1, 2, 3)).argmin()) == name
    return Scores(count=len(images), colors=int(colors), names=int(names))


def draw(
    checkpoint: Path, texts: Sequence[str], seed: int, steps: int = 20, guidance: float = GUIDANCE
) -> list[Image.Image]:
    """Generate one image per text with diffusers, in float32 on the CPU."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        checkpoint, torch_dtype=torch.float32, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images: list[Image.Image] = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        images += pipeline(
            batch, num_inference_steps=steps, guidance_scale=guidance, generator=generator
        ).images
    return images


def sheet(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    pictures: npt.NDArray[np.uint8],
    columns: int = 16,
) -> Image.Image:
    """Arrange images in a grid, each below the training image that its prompt names."""
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (SIZE + 2), rows * (2 * SIZE + 6)), (90, 90, 90))
    for place, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        left, top = place % columns * (SIZE + 2) + 1, place // columns * (2 * SIZE + 6) + 2
        page.paste(Image.fromarray(pictures[parse(prompt)]), (left, top))
        page.paste(image.resize((SIZE, SIZE)), (left, top + SIZE + 1))
    return page


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentforge.export.demo.score",
        description="Generate images of random prompts, and count those with the named background "
        "color and those whose nearest training image is of the named subject.",
        epilog="Exit status: 0 if both targets are met, 3 if not.",
    )
    add = parser.add_argument
    add("package", type=Path, metavar="PACKAGE", help="unpacked emoji-datasource-google 16.0.0")
    add("--checkpoint", type=Path, default=CHECKPOINT, metavar="DIR",
        help="a diffusers directory (default: the checkpoint of latentforge-demo)")  # fmt: skip
    add("--prompts", type=int, default=200, help="number of prompts (default: 200)")
    add("--seed", type=int, default=0, help="seed of prompts and noise (default: 0)")
    add("--steps", type=int, default=20, help="DDIM steps (default: 20)")
    add("--guidance", type=float, default=GUIDANCE, help=f"guidance scale (default: {GUIDANCE})")
    add("--sheet", type=Path, metavar="PNG", help="save the images, each below its training image")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if both targets are met, 3 if not."""
    options = _parser().parse_args(arguments)
    training, texts = pictures(options.package), prompts(options.prompts, options.seed)
    images = draw(options.checkpoint, texts, options.seed, options.steps, options.guidance)
    scores = score(images, texts, training)
    print(scores)
    if options.sheet:
        sheet(images, texts, training).save(options.sheet)
    return 0 if scores.met else 3


if __name__ == "__main__":
    sys.exit(main())
