"""Denoisers that take channels of images besides the latents, and guidance by an image."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Handmade
from numpy.typing import NDArray
from PIL import Image
from test_loop import APPLE, EMPTY, NETWORKS, factor, noise
from test_tasks import ENCODER, clean, half_mask, picture, run

from latentforge.commands.output import print_next_step
from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.errors import SettingsError, ShapeError
from latentforge.runtime.example import example_image
from latentforge.runtime.image import to_array
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Conditioning, NoiseAugmentation, TextEncoding
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.rng import Generator
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.sampling.schedule import Schedule
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


def test_run_edits_an_image(editor: Pipeline, tmp_path: Path) -> None:
    picture().save(tmp_path / "in.png")
    engines = str(editor.directory)
    request = ["--image", "in.png", "--image-guidance-scale", "1.5", "--steps", "2", "--seed", "5"]
    result = run(tmp_path, engines, "a red apple", *request, "-o", "out.png")
    assert result.returncode == 0, result.stderr
    ours = editor("a red apple", **REQUEST, image_guidance_scale=1.5).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(ours))
    result = run(tmp_path, engines, "a red apple", "-o", "none.png")
    assert result.returncode == 2 and "give image (--image)" in result.stderr


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


# The predicted noise is the latents times the mean of the embedding, less one, plus the depth.
DEPTH = (
    EDITOR.replace("batch, 8, h, w", "batch, 5, h, w")
    .replace("<axis = 1>(sample)", "<axis = 1>(sample, parts)")
    .replace("{1, 2, 3}>", "{1, 2, 3}, int64[2] parts = {4, 1}>")
)


@pytest.fixture
def deep(handmade: Handmade) -> Iterator[Pipeline]:
    """Engines that take a depth map."""
    sample = TensorSpec("float32", ("batch", 5, "latent_height", "latent_width"))
    directory = handmade(
        "deep",
        onnx={**NETWORKS, "denoiser": DEPTH, "vae_encoder": ENCODER},
        inputs={"sample": sample},
        conditioning=Conditioning(encoders=TEXT, channels=("depth",)),
    )
    with load(directory, threads=1) as pipeline:
        yield pipeline


def test_the_depth_map_is_a_channel(deep: Pipeline) -> None:
    """One for each prompt, or one for all; in every row of guidance."""
    maps = np.random.default_rng(1).uniform(0, 9, (2, 4, 6))
    depth = 2 * (maps - maps.min((1, 2), keepdims=True)) / np.ptp(maps, (1, 2), keepdims=True) - 1
    request: dict[str, Any] = {"steps": 1, "sampler": "ddim", "seed": 5, "strength": 1.0}
    prompts = ["a red apple", "a red apple"]
    results = [
        deep(prompts, image=picture(), depth_map=given, images_per_prompt=2, **request).latents
        for given in (maps, maps[:1])
    ]
    (interval,) = SAMPLERS["ddim"].plan(deep.manifest.schedule, 1).intervals
    start, end = interval.start, interval.end
    slope = end.sigma - end.alpha * start.sigma / start.alpha
    change = slope * (depth[1] - depth[0])[None].repeat(4, axis=0)
    np.testing.assert_allclose(results[0][2:] - results[1][2:], [change] * 2, atol=1e-4)
    np.testing.assert_array_equal(results[0][:2], results[1][:2])


def test_the_next_command_names_the_images(
    deep: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    print_next_step(deep.directory)
    assert "--image photo.jpg --depth-map depth.png -o" in capsys.readouterr().out


def test_a_depth_map_goes_with_latents_too(deep: Pipeline) -> None:
    request: dict[str, Any] = {"depth_map": half_mask(), "steps": 4, "seed": 1, "sampler": "euler"}
    whole = deep("a fox", image=picture(), strength=1.0, **request)
    first = deep("a fox", image=picture(), strength=None, denoising_end=0.5, **request)
    second = deep("a fox", image=first.latents, denoising_start=0.5, **request)
    assert second.latents.shape == whole.latents.shape
    assert np.isfinite(second.latents).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth_map": None}, "depth estimator is not exported: give depth_map"),
        ({"image": None}, "works on an image"),
        ({"mask": half_mask()}, "omit the mask"),
        ({"depth_map": np.ones((3, 4, 6)) * np.arange(6)}, "3 depth maps for 1 prompts"),
        ({"image_guidance_scale": 2.0}, "image_guidance_scale is for models that edit"),
    ],
)
def test_refuses_without_a_depth_map_that_fits(
    deep: Pipeline, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        deep.stream("a fox", **{"image": picture(), "depth_map": half_mask(), **changes})


# The predicted noise is the latents times the mean of the embedding, less one, plus the first
# channel of the image and a thousandth of the noise level.
UPSCALER = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 7, h, w] sample, float[1] timestep, float[batch, 8, 2] encoder_hidden_states,
   float[batch, 1] noise_level) => (float[batch, 4, h, w] out_sample)
<float one = {1}, int64[3] axes = {1, 2, 3}, int64[2] rear = {2, 3}, int64[3] parts = {4, 1, 2},
 float small = {0.001}>
{
  mean = ReduceMean<axes = [1, 2], keepdims = 0>(encoder_hidden_states)
  shifted = Sub(mean, one)
  factor = Unsqueeze(shifted, axes)
  latents, red, rest = Split<axis = 1>(sample, parts)
  product = Mul(latents, factor)
  image = Add(product, red)
  tall = Unsqueeze(noise_level, rear)
  level = Mul(tall, small)
  out_sample = Add(image, level)
}"""


@pytest.fixture
def upscaler(handmade: Handmade) -> Iterator[Pipeline]:
    """Engines that enlarge an image eight times, without a VAE encoder."""
    schedule = Schedule(
        beta_kind="linear", beta_start=0.0001, beta_end=0.02, spacing=None, offset=0,
        zero_terminal_snr=False, final_alpha_one=None,
    )  # fmt: skip
    directory = handmade(
        "upscaler",
        onnx={**NETWORKS, "denoiser": UPSCALER},
        inputs={
            "sample": TensorSpec("float32", ("batch", 7, "latent_height", "latent_width")),
            "noise_level": TensorSpec("float32", ("batch", 1)),
        },
        conditioning=Conditioning(
            encoders=TEXT,
            channels=("low_resolution",),
            noise_augmentation=NoiseAugmentation(schedule=schedule, max_level=350),
        ),
    )
    with load(directory, threads=1) as pipeline:
        yield pipeline


@pytest.mark.parametrize("level", [0, 20, 350])
def test_the_image_to_enlarge_is_noised(upscaler: Pipeline, level: int) -> None:
    """Its noise is drawn first, and the level is an input."""
    small = picture().resize((6, 4))
    request: dict[str, Any] = {"image": small, "steps": 1, "seed": 5, "guidance_scale": 1.0}
    result = upscaler("a red apple", **request, noise_level=level)
    assert result.images[0].size == (48, 32)
    generator = Generator(5)
    image_noise, x = generator.randn((1, 3, 4, 6)), generator.randn((1, 4, 4, 6))
    augmentation = upscaler.manifest.conditioning.noise_augmentation
    assert augmentation is not None
    noisy = augmentation.schedule.at(level)
    red = noisy.alpha * to_array([small]) + noisy.sigma * image_noise
    (interval,) = SAMPLERS["ddim"].plan(upscaler.manifest.schedule, 1).intervals
    start, end = interval
    e = factor(APPLE) * x + red[:, :1] + level / 1000
    expected = end.alpha * (x - start.sigma * e) / start.alpha + end.sigma * e
    np.testing.assert_allclose(result.latents, expected, rtol=1e-4, atol=1e-3)


def test_sizes_of_the_image_to_enlarge(upscaler: Pipeline) -> None:
    for size, expected in (((7, 5), (48, 32)), ((8, 12), (64, 96))):
        assert upscaler("a fox", image=picture(*size), steps=1).images[0].size == expected
    fixed = upscaler("a fox", image=picture(), height=16, width=32, steps=1)
    assert fixed.images[0].size == (32, 16)
    with pytest.raises(ShapeError, match="1x9 pixels, and this model needs at least 2x2"):
        upscaler("a fox", image=picture(1, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "works on an image"),
        ({"noise_level": 351}, "noise_level is at most 350 for this model, not 351"),
        ({"noise_level": -1}, "noise_level must be an integer of at least 0"),
        ({"noise_level": 2.5}, "noise_level must be an integer"),
        ({"strength": 0.5}, "strength does not apply"),
        ({"image": np.zeros((1, 4, 4, 6), np.float32)}, "cannot continue from latents"),
        ({"mask": half_mask()}, "omit the mask"),
    ],
)
def test_an_upscaler_refuses(upscaler: Pipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        upscaler.stream("a fox", **{"image": picture(), **changes})


def test_other_models_have_no_noise_level(handmade: Handmade) -> None:
    with load(handmade()) as pipe:
        with pytest.raises(SettingsError, match="for models that enlarge an image"):
            pipe("a fox", noise_level=5)


def test_guidance_equals_the_formula_of_diffusers() -> None:
    rng = np.random.default_rng(0)
    blind, image, text = rng.normal(size=(3, 2, 4, 3, 3)).astype(np.float32)
    mixed = Guidance(rows=3, scale=7.5, image_scale=1.5).mix(np.concatenate([blind, image, text]))
    expected = blind + 7.5 * (text - image) + 1.5 * (image - blind)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-5)


LATENTS = np.zeros((1, 4, 4, 6), np.float32)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "works on an image: give image"),
    ({"depth_map": half_mask()}, "takes no depth map"),
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
