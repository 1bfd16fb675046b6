"""Arrays to pictures and back, and how far two of them are apart."""

import base64
import io
import json
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from latentforge.runtime.errors import SettingsError, ShapeError, TargetError
from latentforge.runtime.files import staged_file
from latentforge.runtime.text import one_line

__all__ = [
    "MAX_PSNR",
    "check_output",
    "data_url",
    "difference",
    "from_array",
    "open_picture",
    "psnr",
    "relative_error",
    "save",
    "sheet",
    "to_array",
    "to_mask",
]

MAX_PSNR = 200.0
"""What psnr gives for equal arrays: a number JSON can hold, beyond any float32 difference."""

_AMPLIFIED = 8.0
_EXACT = 128  # pixels a side up to which a picture on a page is exact
_ON_PAGE = 320

_BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)


def from_array(array: NDArray[np.float32]) -> list[Image.Image]:
    """Pictures from (batch, 3, height, width) in -1..1; values beyond are clipped."""
    pixels = (np.clip(array / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in pixels.transpose(0, 2, 3, 1)]


def to_array(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """The inverse of from_array: (batch, 3, height, width) in -1..1."""
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    return (pixels / 127.5 - 1).transpose(0, 3, 1, 2)


def difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far pictures in -1..1 are apart, as one: black where equal, else 8 times what differs."""
    apart: NDArray[np.float32] = np.clip(np.abs(a - b) * _AMPLIFIED, 0, 2) - 1
    return apart


def data_url(picture: NDArray[np.float32]) -> str:
    """One picture (3, height, width) for a page: exact if it is small, else of a page's size."""
    (image,) = from_array(picture[None])
    small = max(image.size) <= _EXACT
    if not small:
        image.thumbnail((_ON_PAGE, _ON_PAGE))
    buffer = io.BytesIO()
    kind = "PNG" if small else "WebP"
    image.save(buffer, format=kind, **({"optimize": True} if small else {"quality": 90}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{data}"


def to_mask(image: Image.Image) -> NDArray[np.float32]:
    """A black and white picture as (1, 1, height, width): 1 where it is light, to be painted."""
    light = np.asarray(image.convert("L"), np.float32) / 255 >= 0.5
    return light.astype(np.float32)[None, None]


def open_picture(path: Path) -> Image.Image:
    """Read a picture from a file, turned as its camera says.

    Raises:
        SettingsError: there is none, or it is damaged, or too large to be meant.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, *_BOMBS) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise SettingsError(f"cannot read {path} as an image: {reason}") from error


def psnr(a: NDArray[Any], b: NDArray[Any], *, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, from -MAX_PSNR, where one holds NaN, to MAX_PSNR.

    Args:
        a: the reference.
        b: what is compared with it, of the same shape.
        peak: the largest possible value; the spread (max - min) of the reference if None.

    Raises:
        ShapeError: a and b are of different shapes.
    """
    reference, other = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if reference.shape != other.shape:
        raise ShapeError(f"cannot compare shape {reference.shape} with {other.shape}")
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return -MAX_PSNR
    error = float(np.mean((reference - other) ** 2))
    top = float(np.ptp(reference)) if peak is None else peak
    if error == 0 or top == 0:
        return MAX_PSNR if error == 0 else 0.0
    return min(MAX_PSNR, 10 * float(np.log10(top**2 / error)))


def relative_error(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """max |a - b| / max |a|, in float64; NaN where one of them holds it."""
    a, b = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(np.float64).tiny))


def check_output(path: Path) -> str:
    """The format that a picture of this name has.

    Asked before the work starts, so that a typo does not cost it.

    Raises:
        TargetError: no such picture format, or the directory is missing or not writable.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise TargetError(f"cannot write {path}: name a .png, .jpg or .webp file")
    parent = path.absolute().parent
    if path.is_dir():
        raise TargetError(f"cannot write {path}: it is a directory")
    try:
        with tempfile.TemporaryFile(dir=parent):  # rights alone do not tell, least of all root's
            pass
    except OSError as error:
        raise TargetError(f"cannot write {path}: {parent}: {error.strerror}") from error
    return kind


def save(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a picture whole or not at all; a PNG carries metadata as its ``latentforge`` text.

    Raises:
        TargetError: no such picture format, or the file cannot be written.
    """
    kind = check_output(path)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("latentforge", json.dumps(metadata, ensure_ascii=False))
    with staged_file(path) as partial:
        image.save(partial, format=kind, **({"pnginfo": info} if kind == "PNG" else {}))


def sheet(rows: Sequence[Sequence[Image.Image]], *, gap: int = 4, scale: int = 1) -> Image.Image:
    """Pictures of one size in rows, with a gap between; enlarged by whole pixels."""
    width, height = (side * scale for side in rows[0][0].size)
    columns = max(map(len, rows))
    size = (columns * (width + gap) - gap, len(rows) * (height + gap) - gap)
    canvas = Image.new("RGB", size, "white")
    for x, y, picture in _placed(rows):
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (x * (width + gap), y * (height + gap)))
    return canvas


def _placed(rows: Sequence[Sequence[Image.Image]]) -> Iterable[tuple[int, int, Image.Image]]:
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            yield x, y, picture
