"""Training images of the demo: Noto emoji on every background color, with captions.

Source: the unpacked npm package ``emoji-datasource-google`` 16.0.0. Its ``emoji.json`` names the
files of ``img/google/64``, 64x64 RGBA images of Google's Noto Emoji.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from latentforge.export.demo import COLORS, NAMES
from latentforge.runtime.files import read_file
from latentforge.runtime.image import open_image

__all__ = ["SIZE", "caption", "captions", "catalogue", "composite", "pictures"]

SIZE = 64
"""Width and height of an image, in pixels."""

_MAX_BYTES = 64 << 20
_CATEGORIES = ("Animals & Nature", "Food & Drink")


def catalogue(package: Path) -> dict[str, Path]:
    """Return the image file of each animal, plant, food and drink of ``package``, by name."""
    entries = json.loads(read_file(package / "emoji.json", _MAX_BYTES))
    files: dict[str, Path] = {}
    for entry in entries:
        if entry["category"] in _CATEGORIES and entry["has_img_google"]:
            name = (entry["name"] or entry["short_name"].replace("_", " ")).lower()
            files.setdefault(name, package / "img" / "google" / "64" / entry["image"])
    return files


def composite(emoji: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Composite an RGBA image on a plain background."""
    background = Image.new("RGBA", emoji.size, (*color, 255))
    background.alpha_composite(emoji)
    return background.convert("RGB")


def pictures(package: Path, names: Iterable[str] = NAMES) -> npt.NDArray[np.uint8]:
    """Return all images as 8-bit RGB, (names, colors, SIZE, SIZE, 3)."""
    files = catalogue(package)
    rows = []
    for name in names:
        image = open_image(files[name])
        emoji = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        rows.append([np.asarray(composite(emoji, color)) for color in COLORS.values()])
    return np.array(rows, dtype=np.uint8)


def captions(name: str, color: str) -> list[str]:
    """Return all captions of an image; those without a color mean a white background."""
    article = "an" if name[0] in "aeiou" else "a"
    named = [name, f"{article} {name}", f"an emoji of {name}"]
    full = [f"{text} on a {color} background" for text in named]
    return full + named if color == "white" else full


def caption(name: str, color: str, chance: float) -> str:
    """Pick a caption by a random number ``chance`` in [0, 1)."""
    forms = captions(name, color)
    return forms[int(chance * len(forms))]
