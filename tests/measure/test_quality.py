"""Image comparison: metrics with closed-form answers, and detection of constant images."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from latentforge.measure.quality.metrics import Perceptual, compare_images, is_constant
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import MAX_PSNR

FEATURES = """<ir_version: 9, opset_import: ["" : 20]>
m (float[batch, 3, h, w] sample) => (float[batch, 3, h, w] same, float[batch, 3, 1, 1] mean)
{ same = Identity(sample)  mean = GlobalAveragePool(sample) }"""


def image(value: int = 0, *, seed: int | None = None) -> Image.Image:
    pixels = np.full((16, 16, 3), value, np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 255, pixels.shape, np.uint8)
    return Image.fromarray(pixels)


def test_equal_images() -> None:
    images = [image(seed=0), image(seed=1)]
    figures = compare_images(images, images)
    assert figures == {"psnr": MAX_PSNR, "psnr_worst": MAX_PSNR, "ssim": pytest.approx(1)}


def test_psnr_covers_all_pixels_and_psnr_worst_one_image() -> None:
    """One image of two differs by 2 in 255: 20 log10(255 / 2) dB; averaging halves the error."""
    a = [image(100), image(100)]
    figures = compare_images(a, [image(102), image(100)])
    assert figures["psnr_worst"] == pytest.approx(20 * np.log10(255 / 2), abs=1e-3)
    assert figures["psnr"] == pytest.approx(figures["psnr_worst"] + 10 * np.log10(2), abs=1e-3)


def test_ssim_of_constant_images() -> None:
    """Without structure, SSIM is its luminance term (2ab + c) / (a² + b² + c), c = (0.01 L)²."""
    a, b = 100 / 127.5 - 1, 140 / 127.5 - 1
    c = (0.01 * 2) ** 2
    expected = (2 * a * b + c) / (a * a + b * b + c)
    figures = compare_images([image(100)], [image(140)])
    assert figures["ssim"] == pytest.approx(expected, abs=1e-4)


def test_images_too_small_for_ssim() -> None:
    small = Image.new("RGB", (4, 4))
    assert "ssim" not in compare_images([small], [small])


def test_constant_images_are_detected() -> None:
    assert is_constant([image(seed=0), image(0)])
    assert is_constant([image(77)])
    assert not is_constant([image(seed=0)])
    striped = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8)[:, None, None], (1, 16, 3)))
    assert not is_constant([striped])


def test_perceptual_distance_of_opposite_features(tmp_path: Path) -> None:
    """White against black: opposite unit vectors, squared distance 4 in each of 2 layers."""
    path = tmp_path / "features.onnx"
    ir.save(ir.from_onnx_text(FEATURES), path)
    distance = Perceptual(path)
    ones = np.ones((2, 3, 8, 8), np.float32)
    assert distance(ones, ones) == 0
    assert distance(ones, -ones) == pytest.approx(8, rel=1e-5)


def test_a_damaged_or_missing_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "features.onnx").write_bytes(b"nothing")
    for name in ("features.onnx", "missing.onnx"):
        with pytest.raises(SettingsError, match=name):
            Perceptual(tmp_path / name)
