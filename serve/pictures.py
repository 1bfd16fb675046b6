"""Pictures of clients, decoded within bounds, and images as files.

A client sends a picture's bytes. No path and no address that it sends is ever opened.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import read_image
from latentforge.runtime.text import one_line
from latentforge.runtime.version import __version__
from latentforge.serve.errors import BadRequestError, PayloadError
from latentforge.serve.request import ImageRequest

__all__ = [
    "ImageFormat",
    "PictureLimits",
    "decode_base64",
    "encode_image",
    "encode_preview",
    "has_holes",
    "image_metadata",
    "image_pixels",
    "mask_levels",
    "open_picture",
    "resized",
    "transparent_mask",
]

Pixels: TypeAlias = "NDArray[np.uint8]"
ImageFormat = Literal["png", "jpeg", "webp"]

_READ = ("PNG", "JPEG", "WEBP")
"""Formats that are read: decoders of others are never given a client's bytes."""

_PNG_LEVEL = 3  # of zlib: three times as fast as 6, and a few per cent larger
_PREVIEW_QUALITY = 80
_ADDRESSES = ("http:", "https:", "file:", "ftp:")


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """Bounds of pictures that clients send.

    Attributes:
        side: longest side in pixels.
        pixels: width times height.
    """

    side: int = 8192
    pixels: int = 1 << 24


def decode_base64(text: str, param: str) -> bytes:
    """Return the bytes of base64, with or without ``data:image/png;base64,`` before it.

    Raises:
        BadRequestError: it is something else, such as an address.
    """
    scheme, separator, rest = text[:256].partition(",")
    if text.lower().startswith(_ADDRESSES):
        raise BadRequestError(
            f"{param} must be a picture in base64: addresses are never opened", param=param
        )
    if separator and scheme.startswith("data:"):
        text = text[len(scheme) + 1 :]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"{param} is not base64: {one_line(error)}", param=param) from error
    if not data:
        raise BadRequestError(f"{param} is empty: send the bytes of a picture", param=param)
    return data


def open_picture(
    data: bytes, param: str, limits: PictureLimits, *, deep: bool = False
) -> Image.Image:
    """Return a picture, turned as its EXIF orientation says, of 8 bits per channel.

    Args:
        data: file of the picture.
        param: its field, for messages.
        limits: of its size.
        deep: True to leave more bits as they are, for depth maps.

    Raises:
        BadRequestError: it is no PNG, JPEG or WebP picture, or is damaged.
        PayloadError: it has more pixels than allowed, which is found before it is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_READ) as opened:
                _check_size(opened.size, param, limits)
                turned = ImageOps.exif_transpose(opened)
                return turned if deep else read_image(param, turned)
    except (PayloadError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PayloadError(error, param=param) from error
    except SettingsError as error:
        raise BadRequestError(error, param=param) from error
    except Exception as error:  # decoders of damaged files have no common class
        raise BadRequestError(
            f"{param} is not a readable PNG, JPEG or WebP picture: {_reason(error)}", param=param
        ) from error


def _reason(error: Exception) -> str:
    unknown = isinstance(error, UnidentifiedImageError)
    return "its format is another one" if unknown else one_line(error)


def _check_size(size: tuple[int, int], param: str, limits: PictureLimits) -> None:
    width, height = size
    if max(size) > limits.side or width * height > limits.pixels:
        raise PayloadError(
            f"{param} has {width}x{height} pixels, and {limits.side} per side and "
            f"{limits.pixels:,} altogether are allowed: send a smaller picture"
        )


def image_pixels(picture: Image.Image) -> Pixels:
    """Return the colours of a picture, (h, w, 3)."""
    return np.asarray(picture.convert("RGB"), np.uint8)


def mask_levels(picture: Image.Image) -> Pixels:
    """Return a mask (h, w) of a picture that is light where to paint."""
    return np.asarray(picture.convert("L"), np.uint8)


def resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return colours (h, w, 3) or levels (h, w) in another size, as the runtime resizes them."""
    if pixels.shape[:2] == (height, width):
        return pixels
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.uint8)


def has_holes(picture: Image.Image) -> bool:
    """Return True if a picture has fully transparent pixels."""
    return bool((_alpha(picture) == 0).any())


def _alpha(picture: Image.Image) -> Pixels:
    return np.asarray(picture.convert("RGBA"), np.uint8)[..., 3]


def transparent_mask(picture: Image.Image, param: str) -> Pixels:
    """Return a mask (h, w) of a picture that is fully transparent where to paint.

    Raises:
        BadRequestError: it has no transparent pixel.
    """
    alpha = _alpha(picture)
    if not (alpha == 0).any():
        raise BadRequestError(
            f"{param} has no fully transparent pixel, which marks where to paint", param=param
        )
    return np.where(alpha == 0, np.uint8(255), np.uint8(0))


def encode_image(
    pixels: Pixels,
    format: ImageFormat = "png",
    *,
    quality: int = 100,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """Return an image (h, w, 3) as a file.

    Args:
        pixels: the image.
        format: of the file.
        quality: of JPEG and WebP, from 0 to 100.
        metadata: stored as JSON in the text chunk ``latentforge`` of a PNG; others drop it.
    """
    options: dict[str, Any] = {"quality": quality}
    if format == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("latentforge", json.dumps(metadata or {}, ensure_ascii=False))
        options = {"compress_level": _PNG_LEVEL, "pnginfo": info}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=format.upper(), **options)
    return file.getvalue()


def encode_preview(pixels: Pixels) -> bytes:
    """Return a small picture (h, w, 3) as a JPEG file."""
    return encode_image(pixels, "jpeg", quality=_PREVIEW_QUALITY)


def image_metadata(request: ImageRequest, index: int) -> dict[str, Any]:
    """Return the settings with which an image of a request is generated alone."""
    whole = request.settings
    negatives = whole.negative_prompts[index : index + 1]
    seed = whole.seeds[index] if len(whole.seeds) > 1 else whole.seeds[0]
    alone = replace(
        whole, prompts=whole.prompts[index : index + 1], negative_prompts=negatives, seed=seed
    )
    return {"latentforge": __version__, "model": request.model, **asdict(alone)}
