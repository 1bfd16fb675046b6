"""Example images, for measurements of models that need an image besides the prompt."""

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["example_depth_map", "example_image"]


def example_image(height: int, width: int) -> Image.Image:
    """Return a disc on a colour gradient, which is the same for everyone."""
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None] * 255
    pixels = np.stack([rows, columns, 255 - rows], axis=-1).astype(np.uint8)
    image = Image.fromarray(pixels)
    box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    ImageDraw.Draw(image).ellipse(box, fill=(230, 40, 90))
    return image


def example_depth_map(height: int, width: int) -> Image.Image:
    """Return a depth map of the example image: the disc in front of a floor."""
    depth = Image.fromarray(np.linspace(0, 160, height).astype(np.uint8)[:, None].repeat(width, 1))
    box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    ImageDraw.Draw(depth).ellipse(box, fill=255)
    return depth
