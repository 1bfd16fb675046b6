"""Images for people to look at: contact sheets, differences, and data URLs for pages."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.image import from_array

__all__ = ["contact_sheet", "data_url", "difference_image"]

_AMPLIFICATION = 8.0
_MAX_LOSSLESS_SIDE = 128  # pixels; larger images on a page are reduced and compressed
_PAGE_SIDE = 320


def difference_image(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return 8 times the absolute difference of images in -1..1, as an image: black where equal."""
    difference: NDArray[np.float32] = np.clip(np.abs(a - b) * _AMPLIFICATION, 0, 2) - 1
    return difference


def data_url(array: NDArray[np.float32]) -> str:
    """Return one image (3, height, width) as a data URL for a web page.

    Images up to 128 pixels a side are lossless, larger ones are reduced to 320 pixels.
    """
    (image,) = from_array(array[None])
    small = max(image.size) <= _MAX_LOSSLESS_SIDE
    if not small:
        image.thumbnail((_PAGE_SIDE, _PAGE_SIDE))
    buffer = io.BytesIO()
    kind = "PNG" if small else "WebP"
    image.save(buffer, format=kind, **({"optimize": True} if small else {"quality": 90}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{data}"


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], *, gap: int = 4, scale: int = 1
) -> Image.Image:
    """Return one image of rows of equally sized images.

    Args:
        rows: images, row by row; rows may differ in length.
        gap: pixels between images, white.
        scale: integer factor to enlarge each image by, without interpolation.
    """
    width, height = (side * scale for side in rows[0][0].size)
    columns = max(map(len, rows))
    size = (columns * (width + gap) - gap, len(rows) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x * (width + gap), y * (height + gap)))
    return sheet
