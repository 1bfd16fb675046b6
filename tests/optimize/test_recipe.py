"""Recipes: those that ship are sound, and a mistake in one names the key and the near miss."""

from pathlib import Path

import pytest

from latentforge.optimize.gate.gate import Gate
from latentforge.optimize.recipe import read_recipe
from latentforge.optimize.recipes import names, summary
from latentforge.runtime.errors import SettingsError


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_are_sound(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.summary == summary(name)
    assert 20 < len(recipe.summary) < 110
    for other in recipe.candidates:
        assert not read_recipe(other).candidates


def test_the_promised_ones_ship() -> None:
    assert set(names()) == {"fp32", "fp16", "int8", "int8-weights", "small", "sparse", "auto"}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'summary = "mine"\nhoist = false\n[precision]\nunet = "int8"\n'
        '[int8]\nranges = "minmax"\n[gate]\npsnr = 33\n'
    )
    recipe = read_recipe(str(path))
    assert not recipe.hoist and recipe.int8.ranges == "minmax" and recipe.gate.psnr == 33
    assert (
        recipe.precision_of("denoiser") == "int8" and recipe.precision_of("vae_decoder") == "fp32"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('summry = "a"', ["'summry'", "did you mean 'summary'"]),
        ('summary = "a"\n[int8]\nrange = "mse"', ["[int8]", "'range'", "did you mean 'ranges'"]),
        ('summary = "a"\n[gate]\npnsr = 3', ["[gate]", "'pnsr'", "did you mean 'psnr'"]),
        ('summary = "a"\n[prune]\nblock = 0.1', ["[prune]", "did you mean 'blocks'"]),
        ('summary = "a"\n[int8]\nranges = "max"', ["'max'", "int8.ranges"]),
        ('summary = "a"\n[precision]\nunet = "int9"', ["'int9'"]),
        ('summary = "a"\nhoist = "yes"', ["bool", "hoist"]),
        ('summary = "a"\n[calibration]\nprompts = 0', ["calibration", "prompts"]),
        ('summary = "a"\n[prune]\nblocks = 1.5', ["blocks", "1.5"]),
        ('summary = "a"\n[gate]\nperceptual = 0.1', ["perceptual", "network"]),
        ("summary = ", ["Invalid value"]),
        ("hoist = true", ["summary"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_recipe(str(path))
    for word in ("mine.toml", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0" * (2 << 20)])
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="mine.toml"):
        read_recipe(str(path))


def test_unknown_names_have_a_near_miss() -> None:
    with pytest.raises(SettingsError, match="did you mean 'int8-weights'"):
        read_recipe("int8-weight")


def test_gate_is_changed_by_settings() -> None:
    gate = Gate(psnr=20.0).changed(["psnr=35", "ssim=0.9", "images=2"])
    assert gate.thresholds == {"psnr": 35.0, "ssim": 0.9} and gate.images == 2


@pytest.mark.parametrize("setting", ["pnsr=3", "psnr", "psnr=good", "images=0", "images=1.5", "=1"])
def test_gate_refuses(setting: str) -> None:
    with pytest.raises(SettingsError, match="gate"):
        Gate().changed([setting])


def test_gate_finds_what_is_missed() -> None:
    gate = Gate(psnr=30, ssim=0.9, max_relative_error=0.1)
    measured = {
        "denoiser": {"max_relative_error": 0.2},
        "vae_decoder": {"max_relative_error": 0.05},
        "image": {"psnr": 29.0, "ssim": float("nan")},
    }
    failures = list(gate.failures(measured))
    assert len(failures) == 3
    assert [failure.split(":")[0] for failure in failures] == ["image", "image", "denoiser"]
    assert list(Gate().failures(measured)) == []
