"""Denoisers that take channels of images besides the latents, and guidance by an image."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import Handmade
from numpy.typing import NDArray
from test_loop import APPLE, EMPTY, NETWORKS, factor, noise
from test_tasks import ENCODER, clean, half_mask, picture

from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.example import example_image
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Conditioning, TextEncoding
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.tensor import Feeds, TensorSpec

pytest.importorskip("onnxruntime")

Array = NDArray[np.floating]

TEXT = (TextEncoding(component="text_encoder", tokenizer="tokenizer"),)

# The predicted noise is the latents times the mean of the embedding, less one, plus the image.
EDITOR = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 8, h, w] sample, float[1] timestep, float[batch, 8, 2] encoder_hidden_states)
  => (float[batch, 4, h, w] out_sample)
<float one = {1}, int64[3] axes = {1, 2, 3}>
{
  mean = ReduceMean<axes = [1, 2], keepdims = 0>(encoder_hidden_states)
  shifted = Sub(mean, one)
  factor = Unsqueeze(shifted, axes)
  latents, image = Split<axis = 1>(sample)
  product = Mul(latents, factor)
  out_sample = Add(product, image)
}"""


@pytest.fixture
def editor(handmade: Handmade) -> Iterator[Pipeline]:
    """Engines that edit an image."""
    sample = TensorSpec("float32", ("batch", 8, "latent_height", "latent_width"))
    directory = handmade(
        onnx={**NETWORKS, "denoiser": EDITOR, "vae_encoder": ENCODER},
        inputs={"sample": sample},
        conditioning=Conditioning(encoders=TEXT, channels=("image",)),
    )
    with load(directory, threads=1) as pipeline:
        yield pipeline


def edited(pipe: Pipeline, seed: int, *, factor: float, image: float) -> Array:
    """Two steps of DDIM, with e = factor * x + image * the latents of picture()."""
    x = noise(seed, (1, 4, 4, 6)).astype(np.float64)
    latents = image * clean(picture()) / 0.5
    for start, end in SAMPLERS["ddim"].plan(pipe.manifest.schedule, 2).intervals:
        e = factor * x + latents
        x = end.alpha * (x - start.sigma * e) / start.alpha + end.sigma * e
    return x


REQUEST: dict[str, Any] = {"image": picture(), "steps": 2, "seed": 5}


@pytest.mark.parametrize("image_scale", [1.0, 1.5, 4.0])
def test_two_scales_of_guidance(editor: Pipeline, image_scale: float) -> None:
    scales = {"guidance_scale": 3.0, "image_guidance_scale": image_scale}
    result = editor("a red apple", **REQUEST, **scales)
    mixed = factor(EMPTY) + 3 * (factor(APPLE) - factor(EMPTY))
    expected = edited(editor, 5, factor=mixed, image=image_scale)
    np.testing.assert_allclose(result.latents, expected, rtol=1e-4, atol=1e-4)


def test_without_guidance_the_image_is_given(editor: Pipeline) -> None:
    result = editor("a red apple", **REQUEST, guidance_scale=1.0)
    expected = edited(editor, 5, factor=factor(APPLE), image=1.0)
    np.testing.assert_allclose(result.latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"image_guidance_scale": 2.0}, [3, 3]),
        ({"image_guidance_scale": 2.0, "images_per_prompt": 2}, [6, 6]),
        ({"image_guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)}, [1, 3]),
        ({"image_guidance_scale": 1.0}, [2, 2]),
        ({"guidance_scale": 1.0}, [1, 1]),
    ],
)
def test_rows_of_a_step(
    editor: Pipeline, settings: dict[str, Any], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = editor.engines["denoiser"].session
    run, seen = unet.run, []

    def counted(feeds: Feeds) -> Any:
        seen.append(len(feeds["sample"]))
        return run(feeds)

    monkeypatch.setattr(unet, "run", counted)
    editor("a red apple", **REQUEST, **settings)
    assert seen == rows


@pytest.mark.parametrize("max_rows", [1, 2, 4])
def test_a_row_at_a_time_gives_the_same(editor: Pipeline, max_rows: int) -> None:
    scales = {"guidance_scale": 3.0, "image_guidance_scale": 1.5, "guidance_interval": (0.0, 0.9)}
    prompts, pictures = ["a red apple", "a"], [picture(), picture().rotate(180)]
    request: dict[str, Any] = {**REQUEST, **scales, "image": pictures, "negative_prompt": "red"}
    expected = editor(prompts, **request)
    with load(editor.directory, threads=1, max_rows=max_rows) as frugal:
        result = frugal(prompts, **request)
    np.testing.assert_allclose(result.latents, expected.latents, rtol=1e-5, atol=1e-5)
    assert np.abs(expected.latents[0] - expected.latents[1]).max() > 0.1


def test_guidance_equals_the_formula_of_diffusers() -> None:
    rng = np.random.default_rng(0)
    blind, image, text = rng.normal(size=(3, 2, 4, 3, 3)).astype(np.float32)
    mixed = Guidance(rows=3, scale=7.5, image_scale=1.5).mix(np.concatenate([blind, image, text]))
    expected = blind + 7.5 * (text - image) + 1.5 * (image - blind)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-5)


LATENTS = np.zeros((1, 4, 4, 6), np.float32)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "edits an image: give image"),
    ({"mask": half_mask()}, "omit the mask"),
    ({"strength": 0.5}, "strength does not apply"),
    ({"image": LATENTS}, "cannot continue from latents"),
    ({"denoising_start": 0.5}, "cannot continue from latents"),
    ({"image_guidance_scale": 0.5}, "image_guidance_scale must be a number from 1"),
    ({"image_guidance_scale": 2.0, "guidance_scale": 1.0}, "guidance_scale above 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[r[1] for r in REFUSED])
def test_refuses(editor: Pipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        editor.stream("a fox", **{**REQUEST, **changes})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_other_models_have_no_image_guidance(handmade: Handmade) -> None:
    with load(handmade()) as pipe:
        with pytest.raises(SettingsError, match="for models that edit an image"):
            pipe("a fox", image_guidance_scale=1.5)


def test_measurements_use_the_example_image(editor: Pipeline) -> None:
    """A request without an image is refused unless the engines were loaded for measurements."""
    with load(editor.directory, threads=1, example_images=True) as measured:
        result = measured("a red apple", steps=2, seed=5)
    given = editor("a red apple", **{**REQUEST, "image": example_image(32, 48)})
    np.testing.assert_array_equal(result.latents, given.latents)
    assert editor.benchmark(repetitions=1, steps=1).batch_size == 1
