"""Recipes: shipped ones are valid, and a mistake in one names the key and the one to use."""

import subprocess
import sys
from pathlib import Path

import pytest

from latentforge.optimize.recipe import read_recipe
from latentforge.optimize.recipes import names, summary
from latentforge.runtime.errors import SettingsError


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.summary == summary(name)
    assert 20 < len(recipe.summary) < 110
    for candidate in recipe.candidates:
        assert not read_recipe(candidate).candidates


def test_all_documented_recipes_ship() -> None:
    assert set(names()) == {
        *("fp32", "fp16", "bf16", "int8", "int8-weights", "small", "sparse", "auto")
    }


def test_reading_a_recipe_loads_no_graph_code() -> None:
    code = (
        "import sys; from latentforge.optimize.recipe import read_recipe; read_recipe('int8'); "
        "print([name for name in ('onnx', 'onnx_ir', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_recipe_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'summary = "mine"\nhoist_invariants = false\n[precision]\ndenoiser = "int8"\n'
        '[int8]\nranges = "minmax"\n[gate]\npsnr = 33\n'
    )
    recipe = read_recipe(str(path))
    assert not recipe.hoist_invariants
    assert recipe.int8.ranges == "minmax" and recipe.gate.psnr == 33
    assert recipe.precision_of("denoiser") == "int8"
    assert recipe.precision_of("vae_decoder") == "fp32"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('summry = "a"', ["'summry'", "did you mean 'summary'"]),
        ('summary = "a"\n[int8]\nrange = "mse"', ["[int8]", "'range'", "did you mean 'ranges'"]),
        ('summary = "a"\n[gate]\npnsr = 3', ["[gate]", "'pnsr'", "did you mean 'psnr'"]),
        ('summary = "a"\n[prune]\nblock = 0.1', ["[prune]", "did you mean 'blocks'"]),
        ('summary = "a"\n[int8]\nranges = "max"', ["'max'", "int8.ranges"]),
        ('summary = "a"\n[precision]\ndenoiser = "int9"', ["'int9'"]),
        ('summary = "a"\nhoist_invariants = "yes"', ["bool", "hoist_invariants"]),
        ('summary = "a"\n[calibration]\nprompts = 0', ["calibration", "prompts", "not 0"]),
        ('summary = "a"\n[prune]\nblocks = 1.5', ["blocks", "1.5"]),
        ('summary = "a"\n[gate]\nperceptual = 0.1', ["perceptual", "network"]),
        ("summary = ", ["Invalid value"]),
        ("hoist_invariants = true", ["summary"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    check_refused(tmp_path, text, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hoist = true", ["'hoist' is called hoist_invariants now"]),
        ("[scan]\nshare = 0.1", ["'scan' is called [sensitivity] now"]),
        ("[weights]\nblock = 32", ["'weights' is called [weight_only] now"]),
        ('[precision]\nunet = "int8"', ["[precision] 'unet' is called denoiser now"]),
        ("[int8]\nkeep = []", ["[int8] 'keep' is called exclude now"]),
        ("[int8]\nsmooth = 0.5", ["[int8] 'smooth' is called smoothquant_alpha now"]),
        ("[int8]\nsmooth_everywhere = true", ["is called smoothquant_insert_mul now"]),
        ("[weight_only]\nblock = 32", ["[weight_only] 'block' is called block_size now"]),
        ("[sensitivity]\nshare = 0.1", ["'share' is called float_fraction now"]),
        ('[sensitivity]\nby = "seconds"', ["'by' is called benefit", '"latency"', '"seconds"']),
        ("[prune]\nmultiple = 4", ["[prune] 'multiple' is called channel_multiple now"]),
        ("[sparsity]\nkeep = []", ["[sparsity] 'keep' is called exclude now"]),
        ("[calibration]\ninputs = 4", ["[calibration] 'inputs' is called samples now"]),
    ],
)
def test_former_keys_are_refused_with_their_present_name(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    check_refused(tmp_path, f'summary = "a"\n{text}', words)


def check_refused(folder: Path, text: str, words: list[str]) -> None:
    path = folder / "mine.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_recipe(str(path))
    for word in ("mine.toml", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0" * (2 << 20)])
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="mine.toml"):
        read_recipe(str(path))


def test_a_mistyped_recipe_gets_a_suggestion() -> None:
    with pytest.raises(SettingsError, match="did you mean 'int8-weights'"):
        read_recipe("int8-weight")
