"""Images side by side: the reference's first, every other one with its difference."""

import base64
import binascii
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from latentforge.measure import formatting
from latentforge.measure.results import Picture

__all__ = ["PageImage", "page_images"]

_URL = re.compile(r"data:image/(png|webp|jpeg);base64,[A-Za-z0-9+/]+={0,2}\Z")
_SMALL = 128  # pixels a side up to which images are enlarged without interpolation


@dataclass(frozen=True, kw_only=True)
class PageImage:
    """Image to draw; ``url`` is empty if the result file has none that is safe to load."""

    name: str
    url: str
    width: int
    height: int
    small: bool
    caption: str


def page_images(picture: Picture) -> Iterator[PageImage]:
    """Yield all images of one request, each followed by its difference to the first."""
    for index, (name, url) in enumerate(picture.images.items()):
        psnr = picture.psnr.get(name) if index else None
        yield _page_image(name, url, formatting.decibels(psnr) if psnr is not None else "")
        if name in picture.differences:
            yield _page_image(name, picture.differences[name], "difference")


def _page_image(name: str, url: str, caption: str) -> PageImage:
    width, height = _size(url)
    return PageImage(
        name=name,
        url=url if width else "",
        width=width,
        height=height,
        small=max(width, height) <= _SMALL,
        caption=caption,
    )


def _size(url: str) -> tuple[int, int]:
    """Return width and height of a data URL's image; zeros for any other URL."""
    if not _URL.match(url):
        return 0, 0
    try:
        data = base64.b64decode(url.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG")) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError):
        return 0, 0
