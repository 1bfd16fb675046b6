"""Arrays to images and back, image metrics, and image files written completely or not at all."""

import json
import math
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.errors import SettingsError, ShapeError, TargetError
from latentforge.runtime.image import (
    MAX_PSNR,
    from_array,
    psnr,
    read_image,
    save_image,
    to_array,
    to_mask,
)


def image(seed: int = 0, size: tuple[int, int] = (5, 7)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


def test_round_trip() -> None:
    images = [image(0), image(1)]
    array = to_array(images)
    assert array.shape == (2, 3, 5, 7) and array.dtype == np.float32
    assert array.min() >= -1 and array.max() <= 1
    for before, after in zip(images, from_array(array), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


def test_every_level_is_preserved() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(from_array(to_array([ramp]))[0]), np.asarray(ramp))


def test_values_out_of_range_are_clipped() -> None:
    array = np.array([-7, -1, 0, 1, 7], np.float32).reshape(1, 1, 1, 5).repeat(3, 1)
    assert np.asarray(from_array(array)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_channels_and_axes_keep_their_places() -> None:
    array = np.full((1, 3, 2, 4), -1, np.float32)
    array[0, 2, 1, 3] = 1
    (result,) = from_array(array)
    assert result.size == (4, 2) and result.getpixel((3, 1)) == (0, 0, 255)


# Pictures of more than 8 bits

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (RAMP, "I;16"),
        (RAMP.astype(">u2"), "I;16B"),
        (RAMP.astype(np.int32), "I"),
        (RAMP.astype(np.int32) >> 8, "I"),
        (RAMP.astype(np.float32) / 65535, "F"),
        ((RAMP >> 8).astype(np.float32), "F"),
    ],
)
def test_grey_pictures_keep_their_levels(pixels: NDArray[Any], mode: str) -> None:
    given = Image.fromarray(pixels)
    assert given.mode == mode
    grey = np.asarray(read_image("image", given), np.int32)
    assert np.array_equal(np.unique(grey), np.arange(256))
    assert np.abs(grey - RAMP / 257).max() <= 1
    assert to_array([read_image("image", given)]).shape == (1, 3, 256, 256)
    assert to_mask(read_image("mask", given)).mean() == pytest.approx(0.5, abs=0.01)


def test_a_file_of_16_bits_keeps_its_levels(tmp_path: Path) -> None:
    for name in ("ramp.png", "ramp.tiff"):
        Image.fromarray(RAMP).save(tmp_path / name)
        assert len(np.unique(np.asarray(read_image("image", tmp_path / name)))) == 256


VALUES: list[tuple[Any, str]] = [
    (np.float32([[0, np.nan]]), "image holds NaN or infinity: give finite numbers from 0 to"),
    (np.float32([[0, np.inf]]), "image holds NaN or infinity"),
    (np.float32([[0, -1]]), r"image holds values from -1.0 to 0.0: scale them to 0 to"),
    (np.float32([[0, 256]]), "image holds values from 0.0 to 256.0: scale"),
    (np.int32([[0, -1]]), "image holds values from -1 to 0: scale"),
    (np.int32([[0, 65536]]), "image holds values from 0 to 65536: scale them to 0 to 65535"),
]


@pytest.mark.parametrize(("pixels", "message"), VALUES)
def test_values_that_no_picture_has(pixels: NDArray[Any], message: str, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "image.tiff")
    for value in (Image.fromarray(pixels), tmp_path / "image.tiff"):
        with pytest.raises(SettingsError, match=message):
            read_image("image", value)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.complex64, "U1", object])
def test_arrays_of_other_types(kind: Any) -> None:
    with pytest.raises(SettingsError, match="^mask must be an array of bool, uint8, uint16 or"):
        read_image("mask", np.zeros((4, 4), kind))
    with pytest.raises(SettingsError, match="scale them to 0 to 1$"):
        read_image("mask", np.full((4, 4), 2.0))


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_a_truncated_picture_that_was_opened_already(kind: str) -> None:
    file = BytesIO()
    image(size=(64, 64)).save(file, kind)
    content = file.getvalue()
    opened = Image.open(BytesIO(content[: len(content) * 2 // 3]))
    with pytest.raises(SettingsError, match="^cannot read image: ") as caught:
        read_image("image", opened)
    assert "\n" not in str(caught.value)


def test_a_pipe_as_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SettingsError, match="pipe.png as an image: not a regular file$"):
        read_image("image", tmp_path / "pipe.png")


def test_a_closed_picture(tmp_path: Path) -> None:
    image().save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as opened:
        pass
    with pytest.raises(SettingsError, match="^cannot read image: "):
        read_image("image", opened)


# psnr


def test_psnr_follows_its_definition() -> None:
    a = np.zeros((4, 4))
    a[0, 0] = 2.0
    assert psnr(a, a + 0.1) == pytest.approx(10 * math.log10(4 / 0.01))
    assert psnr(a, a + 0.1, peak=1.0) == pytest.approx(20)
    assert psnr(a, a - 10) < 0


def test_psnr_of_equal_arrays() -> None:
    a = np.random.default_rng(0).normal(size=(3, 4))
    assert psnr(a, a) == psnr(a * 0, a * 0) == MAX_PSNR
    assert psnr(a, a * (1 + 1e-300)) == MAX_PSNR
    assert psnr(np.ones(3), np.zeros(3)) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_psnr_of_nan_is_the_lowest(bad: float) -> None:
    good = np.arange(4.0)
    broken = np.array([0, 1, 2, bad])
    for a, b in ((good, broken), (broken, good), (broken, broken)):
        assert psnr(a, b) == psnr(a, b, peak=1.0) == -MAX_PSNR


def test_psnr_compares_equal_shapes_only() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 3\) with \(2, 3\)"):
        psnr(np.zeros((1, 3)), np.zeros((2, 3)))


# Files


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.webp", "a.b.png"])
def test_save(tmp_path: Path, name: str) -> None:
    save_image(image(), tmp_path / name, {"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with Image.open(tmp_path / name) as loaded:
        loaded.load()
        assert loaded.size == (7, 5)


def test_a_png_stores_its_settings(tmp_path: Path) -> None:
    settings = {"prompt": "a red \U0001f98a, 蝶\n", "seed": 2**63, "scale": 7.5}
    save_image(image(), tmp_path / "a.png", settings)
    with Image.open(tmp_path / "a.png") as loaded:
        assert json.loads(loaded.info["latentforge"]) == settings
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image()))


@pytest.mark.parametrize("name", ["a", "a.", ".png", "a.txt", "a.psd", "a.png.exe"])
def test_refuses_other_formats(tmp_path: Path, name: str) -> None:
    with pytest.raises(TargetError, match=r"name a .png, .jpg or .webp file"):
        save_image(image(), tmp_path / name, {})
    assert list(tmp_path.iterdir()) == []


def test_refuses_an_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "a.png", tmp_path / "file" / "a.png", Path("/proc/a.png")):
        with pytest.raises(TargetError, match="cannot write"):
            save_image(image(), path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(TypeError):
        save_image(image(), tmp_path / "a.png", {"seed": object()})
    assert (tmp_path / "a.png").read_text() == "old"
