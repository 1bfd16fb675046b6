"""Pictures of clients: read within bounds, or refused by name."""

import base64
import io
import json
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentforge.serve.errors import BadRequestError, PayloadError
from latentforge.serve.pictures import (
    PictureLimits,
    decode_base64,
    encode_image,
    has_holes,
    image_pixels,
    mask_levels,
    open_picture,
    transparent_mask,
)

LIMITS = PictureLimits(side=64, pixels=2048)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG file of some hundred bytes that says it has this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000, 9)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_read(format: str) -> None:
    picture = open_picture(saved(Image.new("RGB", (6, 4), "red"), format), "image", LIMITS)
    assert image_pixels(picture).shape == (4, 6, 3)
    assert image_pixels(picture)[0, 0, 0] > 200


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_are_read(mode: str) -> None:
    format = "JPEG" if mode == "CMYK" else "PNG"
    picture = open_picture(saved(Image.new(mode, (6, 4)), format), "image", LIMITS)
    assert image_pixels(picture).shape == (4, 6, 3) and mask_levels(picture).shape == (4, 6)


def test_pictures_are_turned_as_they_say() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = open_picture(saved(Image.new("RGB", (6, 4)), "JPEG", exif=exif), "image", LIMITS)
    assert turned.size == (4, 6)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        saved(Image.new("RGB", (4, 4)), "GIF"),
        saved(Image.new("RGB", (4, 4)), "TIFF"),
        saved(Image.new("RGB", (4, 4)))[:45],
        saved(Image.new("RGB", (4, 4)), "JPEG")[:200],
        saved(Image.new("RGB", (4, 4)), "WEBP")[:30],
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequestError) as refused:
        open_picture(data, "mask", LIMITS)
    assert refused.value.param == "mask" and "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [(65, 2), (2, 65), (64, 33), (60_000, 60_000), (1 << 30, 1)])
def test_pictures_that_are_too_large_are_not_decoded(size: tuple[int, int]) -> None:
    start = time.process_time()
    with pytest.raises(PayloadError) as refused:
        open_picture(png_of_size(*size), "image", LIMITS)
    assert refused.value.param == "image"
    assert time.process_time() - start < 0.5


def test_text_in_a_picture_that_unpacks_to_gigabytes_is_refused() -> None:
    packed = zlib.compress(b"a" * (80 << 20), 9)
    content = b"key\0\0" + packed
    check = struct.pack(">I", zlib.crc32(b"zTXt" + content))
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + check
    whole = saved(Image.new("RGB", (4, 4)))
    with pytest.raises(BadRequestError):
        open_picture(whole[:33] + chunk + whole[33:], "image", LIMITS)


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1/x.png", "file:///etc/passwd", "/etc/passwd", "", "data:,", "é", "a"]
)
def test_only_base64_is_decoded(text: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        decode_base64(text, "image")
    assert refused.value.param == "image"


def test_base64_may_have_a_type_before_it() -> None:
    text = base64.b64encode(b"abc").decode()
    assert decode_base64(text, "image") == decode_base64(f"data:image/png;base64,{text}", "image")


def test_transparent_parts_are_masks() -> None:
    pixels = np.full((2, 3, 4), 255, np.uint8)
    opaque = open_picture(saved(Image.fromarray(pixels)), "image", LIMITS)
    pixels[0, 1, 3] = 0
    pixels[1, 1, 3] = 1
    picture = open_picture(saved(Image.fromarray(pixels)), "image", LIMITS)
    assert has_holes(picture) and not has_holes(opaque)
    assert transparent_mask(picture, "mask").tolist() == [[0, 255, 0], [0, 0, 0]]
    with pytest.raises(BadRequestError, match="transparent"):
        transparent_mask(opaque, "mask")


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_images_become_files(format: Any) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    data = encode_image(pixels, format, metadata={"prompt": "é"})
    image = Image.open(io.BytesIO(data))
    assert image.format == format.upper() and image.size == (4, 4)
    if format == "png":
        assert np.array_equal(np.asarray(image), pixels)
        assert json.loads(image.info["latentforge"]) == {"prompt": "é"}
    smaller = encode_image(pixels, format, quality=1)
    assert format == "png" or len(smaller) < len(data)
