"""Requests of clients: completed as the pipeline completes them, and cut into rows and batches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentforge import load
from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.manifest import Manifest
from latentforge.serve.request import Batch, ImageRequest, seeds_from


@pytest.fixture
def manifest(handmade: Callable[..., Path]) -> Manifest:
    return Manifest.read(handmade())


def test_it_is_completed_as_the_pipeline_completes_it(handmade: Callable[..., Path]) -> None:
    directory = handmade()
    asked: dict[str, Any] = {"steps": 3, "guidance_scale": 2, "negative_prompt": "red"}
    request = ImageRequest.of("m", Manifest.read(directory), "an apple", count=2, seed=7, **asked)
    with load(directory) as pipeline:
        settings = pipeline.settings(["an apple"] * 2, seed=(7, 8), **asked)
    assert request.settings == settings
    assert request.count == 2


def test_an_image_gives_the_size_and_the_strength(manifest: Manifest) -> None:
    image = np.zeros((40, 70, 3), np.uint8)
    with pytest.raises(Exception, match="no vae_encoder"):
        ImageRequest.of("m", manifest, "a", image=image)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, SettingsError, "steps"),
        ({"sampler": "magic"}, SettingsError, "magic"),
        ({"height": 33}, ShapeError, "height must be a multiple of 16"),
        ({"strength": 0.5}, SettingsError, "give image"),
        ({"seed": "one"}, SettingsError, "seed must be a 64-bit integer"),
        ({"seed": True}, SettingsError, "seed must be a 64-bit integer"),
        ({"steps": True}, SettingsError, "steps must be an integer"),  # although 1 was kept
        ({"negative_prompt": "\ud800"}, SettingsError, "not valid UTF-8"),
        ({"cached_steps": (1,)}, SettingsError, "no denoiser_cached"),
        ({"unheard": 1}, SettingsError, "no setting 'unheard'"),
        ({"noise_level": 3}, SettingsError, "noise_level is for models that enlarge"),
        ({"mask": np.zeros((32, 48), np.uint8)}, SettingsError, "give image too"),
    ],
)
def test_faults_are_found_without_engines(
    manifest: Manifest, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    ImageRequest.of("m", manifest, "a red apple", steps=1)
    with pytest.raises(error, match=message):
        ImageRequest.of("m", manifest, "a red apple", **settings)


def test_seeds_are_consecutive_and_start_again_at_the_end() -> None:
    assert seeds_from(5, 3) == (5, 6, 7)
    assert seeds_from(-2, 4) == (-2, -1, 0, 1)
    assert seeds_from(2**64 - 2, 3) == (2**64 - 2, 2**64 - 1, 0)
    assert seeds_from(2**64, 2) == (2**64, 2**64 + 1)  # left for the settings to refuse


def test_settings_are_checked_once_for_requests_of_text(manifest: Manifest) -> None:
    one = ImageRequest.of("m", manifest, "a red", steps=7, seed=1)
    other = ImageRequest.of("m", manifest, "an apple", steps=7, count=2)
    assert one.shared is other.shared
    assert (one.settings.prompts, other.settings.prompts) == (("a red",), ("an apple",) * 2)
    same = msgspec.structs.replace(manifest)
    assert ImageRequest.of("m", same, "a red", steps=7).shared is not one.shared


def test_a_request_without_seed_draws_one(manifest: Manifest) -> None:
    first, second = (ImageRequest.of("m", manifest, "a", count=2).settings.seeds for _ in range(2))
    assert first != second and first[1] == first[0] + 1


def test_the_key_leaves_out_prompts_and_seeds(manifest: Manifest) -> None:
    one = ImageRequest.of("m", manifest, "a red", count=3, seed=1)
    other = ImageRequest.of("m", manifest, "an apple", seed=9, previews=2)
    assert one.key == other.key and hash(one.key) == hash(other.key)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 5},
        {"height": 48},
        {"guidance_scale": 2.0},
        {"sampler": "euler"},
        {"negative_prompt": ""},
    ],
)
def test_the_key_has_everything_else(manifest: Manifest, change: dict[str, Any]) -> None:
    request = ImageRequest.of("m", manifest, "a", seed=1)
    assert ImageRequest.of("m", manifest, "a", seed=1, **change).key != request.key
    assert ImageRequest.of("other", manifest, "a", seed=1).key != request.key


def test_the_key_has_the_mask_and_the_presence_of_an_image(manifest: Manifest) -> None:
    request = ImageRequest.of("m", manifest, "a", seed=1)
    image, mask = np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), np.uint8)
    keys = {
        replace(request, image=given, mask=part).key
        for given in (None, image, image + 1)
        for part in (None, mask, mask + 1, mask.reshape(48, 32))
    }
    assert len(keys) == 2 * 4  # the pixels of images are a row's own, those of masks are not


def test_the_cost_counts_steps_that_run_pixels_rows_and_images(manifest: Manifest) -> None:
    size = {"height": 256, "width": 512}
    request = ImageRequest.of("m", manifest, "a", count=3, steps=10, guidance_scale=2.0, **size)
    assert request.cost == pytest.approx(10 * 0.5 * 2 * 3)
    alone = ImageRequest.of("m", manifest, "a", steps=10, guidance_scale=1.0, **size)
    assert alone.cost == pytest.approx(10 * 0.5)


def test_a_batch_has_its_rows_prompts_and_seeds(manifest: Manifest) -> None:
    one = ImageRequest.of("m", manifest, "a red", negative_prompt="an apple", count=2, seed=1)
    other = ImageRequest.of("m", manifest, "an apple", negative_prompt="", seed=9)
    batch = Batch(id=1, key=one.key, rows=(*one.rows("x"), *other.rows("y")))
    assert batch.settings.prompts == ("a red", "a red", "an apple")
    assert batch.settings.negative_prompts == ("an apple", "an apple", "")
    assert batch.settings.seeds == (1, 2, 9)
    assert batch.settings.steps == one.settings.steps
    assert batch.images is None and batch.model == "m"
    assert one.key == other.key
