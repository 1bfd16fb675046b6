"""Example images, for measurements of models that need an image besides the prompt."""

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["example_image"]


def example_image(height: int, width: int) -> Image.Image:
    """Return a disc on a colour gradient, which is the same for everyone."""
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None] * 255
    pixels = np.stack([rows, columns, 255 - rows], axis=-1).astype(np.uint8)
    image = Image.fromarray(pixels)
    box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    ImageDraw.Draw(image).ellipse(box, fill=(230, 40, 90))
    return image
