"""Depth maps: resized and normalized as torch and diffusers do it."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentforge.runtime.denoising.depth import depth_channel
from latentforge.runtime.errors import SettingsError, ShapeError

MAPS = np.random.default_rng(0).uniform(2, 9, (2, 21, 34)).astype(np.float32)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (21, 34), (40, 12), (1, 2), (64, 96)])
def test_as_in_diffusers(height: int, width: int) -> None:
    torch = pytest.importorskip("torch")
    maps = torch.nn.functional.interpolate(
        torch.from_numpy(MAPS)[:, None], size=(height, width), mode="bicubic", align_corners=False
    )
    low, high = (f(maps, dim=[1, 2, 3], keepdim=True) for f in (torch.amin, torch.amax))
    expected = 2.0 * (maps - low) / (high - low) - 1.0
    ours = depth_channel(MAPS, height=height, width=width)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


def test_images_of_any_mode_and_unit() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    expected = depth_channel(grey, height=4, width=4)
    fine = np.arange(64).reshape(8, 8)
    same: list[Any] = [
        grey.convert("RGB"),
        Image.fromarray((fine * 900).astype(np.uint16)),
        Image.fromarray((fine * 70000).astype(np.int32)),
        Image.fromarray((fine / 64 - 3).astype(np.float32)),
        fine[None],
        [grey],
    ]
    for depth_map in same:
        ours = depth_channel(depth_map, height=4, width=4)
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert (expected.min(), expected.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("depth_map", "error", "message"),
    [
        (Image.new("L", (8, 8), 7), SettingsError, "single value"),
        (np.full((1, 8, 8), np.nan), SettingsError, "NaN"),
        (np.ones((8, 8)), ShapeError, r"\(maps, height, width\), not of shape \(8, 8\)"),
        (np.ones((0, 8, 8)), ShapeError, "not of shape"),
        (np.full((1, 8, 8), "x"), SettingsError, "must hold numbers"),
        ("map.png", SettingsError, "PIL image, not str"),
        ([], SettingsError, "PIL image, not list"),
        ([1], SettingsError, "PIL image, not int"),
        (3, SettingsError, "PIL image, not int"),
    ],
)
def test_refuses(depth_map: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        depth_channel(depth_map, height=4, width=4)
    assert "\n" not in str(caught.value)
