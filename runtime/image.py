"""Arrays to images and back, image files, and metrics between two images."""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
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
    "SAME_IMAGE_PSNR",
    "check_image_path",
    "from_array",
    "open_image",
    "psnr",
    "relative_error",
    "save_image",
    "to_array",
    "to_mask",
]

MAX_PSNR = 200.0
"""PSNR of equal arrays: finite, as JSON requires, and beyond that of any float32 difference."""

SAME_IMAGE_PSNR: Mapping[str, float] = {"fp32": 40.0, "fp16": 30.0}
"""PSNR in dB from which an image counts as equal to the reference (class A), by precision."""

_BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)


def from_array(array: NDArray[np.float32]) -> list[Image.Image]:
    """Convert an array (batch, 3, height, width) in -1..1 to images; other values are clipped."""
    pixels = (np.clip(array / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(image) for image in pixels.transpose(0, 2, 3, 1)]


def to_array(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Convert images of one size to an array (batch, 3, height, width) in -1..1."""
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    return (pixels / 127.5 - 1).transpose(0, 3, 1, 2)


def to_mask(image: Image.Image) -> NDArray[np.float32]:
    """Convert an image to an inpainting mask (1, 1, height, width): 1 where it is light."""
    light = np.asarray(image.convert("L"), np.float32) / 255 >= 0.5
    return light.astype(np.float32)[None, None]


def open_image(path: Path) -> Image.Image:
    """Read an image from a file, rotated as its EXIF orientation says.

    Raises:
        SettingsError: the file is missing, damaged, or implausibly large.
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
    """Return the peak signal-to-noise ratio in dB, from -MAX_PSNR (NaN or infinity) to MAX_PSNR.

    Args:
        a: the reference.
        b: the array to compare, of the same shape.
        peak: difference between the largest and smallest possible value; max - min of the reference
            if None.

    Raises:
        ShapeError: a and b have different shapes.
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
    """Return max |a - b| / max |a| in float64; NaN if one of the arrays contains it."""
    a, b = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(np.float64).tiny))


def check_image_path(path: Path) -> str:
    """Return the format of an image file by its suffix, and check that it can be written.

    Commands call this before they start, so that a typo does not cost the work.

    Raises:
        TargetError: unknown image format, or the directory is missing or not writable.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise TargetError(f"cannot write {path}: name a .png, .jpg or .webp file")
    parent = path.absolute().parent
    if path.is_dir():
        raise TargetError(f"cannot write {path}: it is a directory")
    try:
        with tempfile.TemporaryFile(dir=parent):  # root may write whatever permissions say
            pass
    except OSError as error:
        raise TargetError(f"cannot write {path}: {parent}: {error.strerror}") from error
    return kind


def save_image(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write an image completely or not at all.

    Args:
        image: the image.
        path: its suffix selects the format.
        metadata: stored as JSON in the text chunk ``latentforge`` of a PNG; other formats drop it.

    Raises:
        TargetError: unknown image format, or the file cannot be written.
    """
    kind = check_image_path(path)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("latentforge", json.dumps(metadata, ensure_ascii=False))
    with staged_file(path) as partial:
        image.save(partial, format=kind, **({"pnginfo": info} if kind == "PNG" else {}))
