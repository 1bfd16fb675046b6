"""Images for people to look at."""

import numpy as np
from PIL import Image

from latentforge.measure.pictures import contact_sheet


def image(seed: int = 0, size: tuple[int, int] = (5, 7)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


def test_contact_sheet() -> None:
    rows = [[image(0), image(1)], [image(2)]]
    whole = contact_sheet(rows, gap=3, scale=2)
    assert whole.size == (2 * 14 + 3, 2 * 10 + 3)
    assert whole.getpixel((15, 0)) == (255, 255, 255)
    assert whole.getpixel((17 + 2 * 6, 2 * 4)) == image(1).getpixel((6, 4))
    assert whole.getpixel((0, 13)) == image(2).getpixel((0, 0))
    assert whole.getpixel((20, 20)) == (255, 255, 255)
