"""Arrays to images and back, image files, and metrics between two images."""

import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from latentforge.runtime.errors import SettingsError, ShapeError, TargetError
from latentforge.runtime.files import check_file_target, open_regular, staged_file
from latentforge.runtime.text import one_line, printable
from latentforge.runtime.validation import shown

__all__ = [
    "MAX_PSNR",
    "SAME_IMAGE_PSNR",
    "check_image_path",
    "decode_image",
    "from_array",
    "open_image",
    "psnr",
    "read_image",
    "relative_error",
    "save_image",
    "to_array",
    "to_mask",
]

MAX_PSNR = 200.0
"""PSNR of equal arrays: finite, as JSON requires, and beyond that of any float32 difference."""

SAME_IMAGE_PSNR: Mapping[str, float] = {"fp32": 40.0, "fp16": 30.0, "bf16": 30.0}
"""PSNR in dB from which an image counts as equal to the reference (class A), by precision."""


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


def read_image(name: str, value: object) -> Image.Image:
    """Return a picture of 8 bits per channel, completely read.

    Args:
        name: of the argument, for errors.
        value: a PIL image; the path of a file; or an array (h, w), (h, w, 1), (h, w, 3) or
            (h, w, 4) of booleans, of 8- or 16-bit unsigned integers, or of floats from 0 to 1.

    Raises:
        SettingsError: it is none of these, damaged, or holds values that no picture has.
    """
    if isinstance(value, np.ndarray):
        return _from_pixels(name, value)
    if isinstance(value, str | os.PathLike):
        return read_image(name, open_image(Path(value)))
    if not isinstance(value, Image.Image):
        raise SettingsError(
            f"{name} must be a PIL image, a path or an array, not {type(value).__name__}"
        )
    if 0 in value.size:
        raise SettingsError(f"{name} must have pixels, and is {value.width}x{value.height}")
    try:
        value.load()
        if value.mode[0] in "IF":
            return Image.fromarray(_grey(name, np.asarray(value), value.mode))
        return value if value.mode in ("L", "RGB") else _of_supported_mode(value)
    except SettingsError:
        raise
    except Exception as error:  # decoders of damaged files have no common class
        raise SettingsError(f"cannot read {name}: {one_line(error)}") from error


def _of_supported_mode(image: Image.Image) -> Image.Image:
    """Return an image, after trying the conversion that it needs later."""
    image.crop((0, 0, 1, 1)).convert("RGB")
    return image


def _from_pixels(name: str, pixels: NDArray[Any]) -> Image.Image:
    flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    colors = flat.ndim == 3 and flat.shape[2] in (3, 4)
    if 0 in flat.shape or not (flat.ndim == 2 or colors):
        raise SettingsError(
            f"{name} must be an array (h, w), (h, w, 3) or (h, w, 4), not of shape {pixels.shape}; "
            "latents are (images, channels, h, w)"
        )
    return Image.fromarray(_levels(name, flat))


def _levels(name: str, pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the pixels of an array as 8-bit levels."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return _scaled(pixels, 65535)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise SettingsError(
            f"{name} must be an array of bool, uint8, uint16 or floats from 0 to 1, not "
            f"{pixels.dtype}"
        )
    return _scaled(_within(name, pixels, 1), 1)


def _grey(name: str, pixels: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    """Return a greyscale picture of 16 or 32 bits as 8-bit levels.

    Pillow's modes I and F have no scale of their own: it follows from the largest value.
    """
    if mode.startswith("I;16"):
        return _scaled(pixels, 65535)
    scales = (1, 255) if mode == "F" else (255, 65535)
    values = _within(name, pixels, scales[-1])
    return _scaled(values, scales[0] if values.max() <= scales[0] else scales[-1])


def _within(name: str, pixels: NDArray[Any], top: int) -> NDArray[Any]:
    """Return the pixels, after a check that they are finite and from 0 to `top`."""
    if not np.isfinite(pixels).all():
        raise SettingsError(f"{name} holds NaN or infinity: give finite numbers from 0 to {top}")
    if pixels.min() < 0 or pixels.max() > top:
        low, high = shown(pixels.min().item()), shown(pixels.max().item())
        raise SettingsError(f"{name} holds values from {low} to {high}: scale them to 0 to {top}")
    return pixels


def _scaled(pixels: NDArray[Any], top: int) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = (pixels.astype(np.float64) * (255 / top)).round().astype(np.uint8)
    return levels


def open_image(path: Path) -> Image.Image:
    """Read an image from a file, rotated as its EXIF orientation says.

    Raises:
        SettingsError: the file is missing, damaged, or implausibly large.
    """
    with _blaming(path), open_regular(path) as file:
        return _decoded(file)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Read an image from the bytes of its file, as open_image() does.

    Raises:
        SettingsError: they are damaged, or implausibly large; by the name.
    """
    with _blaming(name):
        return _decoded(io.BytesIO(content))


@contextmanager
def _blaming(name: object) -> Iterator[None]:
    """Turn errors of a decoder into those of the named file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except Exception as error:  # decoders of damaged files have no common class
        reason = printable(one_line(getattr(error, "strerror", None) or error))
        name = printable(one_line(name))
        raise SettingsError(f"cannot read {name} as an image: {reason}") from error


def _decoded(file: BinaryIO) -> Image.Image:
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image)


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
    check_file_target(path)
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
