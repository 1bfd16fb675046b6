"""The embedded demo checkpoint: a small Stable Diffusion which draws emoji on coloured backgrounds.

Only the standard library is needed to import this, so that a runtime without torch can ask where
the checkpoint lies and what it can draw.
"""

import random
from pathlib import Path

__all__ = ["CHECKPOINT", "COLORS", "GUIDANCE", "NAMES", "prompts"]

#: A diffusers ``StableDiffusionPipeline`` directory.
CHECKPOINT: Path = Path(__file__).resolve().parent / "checkpoint"

#: What the checkpoint can draw, one or two lower-case words each.
NAMES: tuple[str, ...] = tuple(
    Path(__file__).resolve().with_name("names.txt").read_text(encoding="utf-8").splitlines()
)

#: The guidance scale it draws best with.
GUIDANCE: float = 1.5

#: The background colours it knows, as 8-bit RGB.
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


def prompts(count: int, seed: int) -> list[str]:
    """Draw ``count`` prompts "NAME on a COLOR background", the same ones for the same ``seed``."""
    rng = random.Random(seed)
    colors = list(COLORS)
    return [f"{rng.choice(NAMES)} on a {rng.choice(colors)} background" for _ in range(count)]
