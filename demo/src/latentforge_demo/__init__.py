"""Demo checkpoint of latentforge: a small Stable Diffusion that draws emoji on plain backgrounds.

Importing it needs nothing but the standard library.
"""

import random
from pathlib import Path

__all__ = ["CHECKPOINT", "COLORS", "GUIDANCE", "NAMES", "prompts"]

CHECKPOINT: Path = Path(__file__).resolve().parent / "checkpoint"
"""Directory of the checkpoint, in the layout of diffusers' ``StableDiffusionPipeline``."""

NAMES: tuple[str, ...] = tuple(
    Path(__file__).resolve().with_name("names.txt").read_text(encoding="utf-8").splitlines()
)
"""Subjects that the checkpoint can draw, one or two lower-case words each."""

GUIDANCE: float = 1.5
"""Guidance scale with the best scores."""

COLORS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "yellow": (250, 210, 50),
    "pink": (250, 150, 190),
    "grey": (130, 130, 130),
}
"""Background colours that the checkpoint can draw, as 8-bit RGB."""


def prompts(count: int, seed: int) -> list[str]:
    """Draw ``count`` random prompts "NAME on a COLOR background"; the same seed repeats them."""
    rng = random.Random(seed)
    colors = list(COLORS)
    return [f"{rng.choice(NAMES)} on a {rng.choice(colors)} background" for _ in range(count)]
