"""Pictures side by side: the first one, and every other with what is different in it."""

import base64
import binascii
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from latentforge.measure.report import words
from latentforge.measure.results import Picture

__all__ = ["Shown", "shown"]

_URL = re.compile(r"data:image/(png|webp|jpeg);base64,[A-Za-z0-9+/]+={0,2}\Z")
_SMALL = 128  # pixels a side, below which they are enlarged by whole pixels


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture to draw; ``url`` is empty where the file has none that can be trusted."""

    name: str
    url: str
    width: int
    height: int
    small: bool
    caption: str


def shown(picture: Picture) -> Iterator[Shown]:
    """All of one request, each followed by its difference."""
    for index, (name, url) in enumerate(picture.images.items()):
        close = picture.psnr.get(name) if index else None
        yield _shown(name, url, words.decibels(close) if close is not None else "")
        if name in picture.differences:
            yield _shown(name, picture.differences[name], "difference")


def _shown(name: str, url: str, caption: str) -> Shown:
    width, height = _size(url)
    return Shown(
        name=name,
        url=url if width else "",
        width=width,
        height=height,
        small=max(width, height) <= _SMALL,
        caption=caption,
    )


def _size(url: str) -> tuple[int, int]:
    """Pixels of a data URL's picture; zeros for anything else, which is not to be loaded."""
    if not _URL.match(url):
        return 0, 0
    try:
        data = base64.b64decode(url.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG")) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError):
        return 0, 0
