"""Image-to-image, inpainting and continuing from latents: what is kept, and what is rejected."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import Handmade, handmade_engines
from numpy.typing import NDArray
from PIL import Image
from test_loop import NETWORKS

from latentforge.runtime.errors import ManifestError, SettingsError, ShapeError
from latentforge.runtime.image import open_image, to_array, to_mask
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.request_completion import complete_request
from latentforge.runtime.resolved_request import ResolvedRequest
from latentforge.runtime.sampling import SAMPLERS

pytest.importorskip("onnxruntime")

# The mean of each 8 x 8 pixels, a fourth channel of zeros, and no variance worth the name.
ENCODER = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 3, h, w] sample) => (float[batch, 8, hh, ww] latent_parameters)
<int64[1] first = {0}, int64[1] one = {1}, int64[1] axis = {1}, float zero = {0}, float low = {-60}>
{
  mean = AveragePool<kernel_shape = [8, 8], strides = [8, 8]>(sample)
  red = Slice(mean, first, one, axis)
  none = Mul(red, zero)
  little = Add(none, low)
  latent_parameters = Concat<axis = 1>(mean, none, little, little, little, little)
}"""


@pytest.fixture
def pipe(handmade: Handmade) -> Iterator[Pipeline]:
    """Engines of 8 x 8 pixels a latent, with a VAE encoder."""
    directory = handmade(onnx={**NETWORKS, "vae_encoder": ENCODER})
    with load(directory, threads=1) as pipeline:
        yield pipeline


def picture(width: int = 48, height: int = 32) -> Image.Image:
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    pixels = cells.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return Image.fromarray(pixels)


def half_mask(width: int = 48, height: int = 32) -> Image.Image:
    """Light on the right."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def clean(image: Image.Image) -> NDArray[np.float32]:
    """The latents that ENCODER gives, scaled by the handmade manifest's 0.5."""
    pixels = to_array([image])
    _, _, height, width = pixels.shape
    means = pixels.reshape(1, 3, height // 8, 8, width // 8, 8).mean(axis=(3, 5))
    return np.concatenate([means, 0 * means[:, :1]], axis=1) * np.float32(0.5)


# Effects of an image


def test_the_size_defaults_to_the_image(pipe: Pipeline) -> None:
    for size in ((48, 32), (32, 64), (16, 16)):
        assert pipe("a fox", image=picture(*size), steps=2).images[0].size == size
    assert pipe("a fox", image=picture(40, 50), steps=2).images[0].size == (32, 48)
    assert pipe("a fox", image=picture(), height=16, width=32, steps=2).images[0].size == (32, 16)


def test_strength_sets_the_number_of_steps(pipe: Pipeline) -> None:
    for strength, count in ((0.25, 1), (0.5, 2), (0.99, 3), (1.0, 4)):
        steps = list(pipe.stream("a fox", image=picture(), steps=4, strength=strength))
        assert [step.index for step in steps] == list(range(count)) and steps[0].count == count
    assert pipe.settings("a fox", image=picture()).strength == 0.8
    assert pipe.settings("a fox", image=picture(), mask=half_mask()).strength == 1.0


def test_a_request_is_complete_and_checked_without_engines(
    handmade: Handmade, pipe: Pipeline
) -> None:
    """A server checks requests in a process that never loads an engine."""
    manifest = Manifest.read(handmade("read", onnx={**NETWORKS, "vae_encoder": ENCODER}))
    settings = complete_request(manifest, "a fox", image=picture(), steps=5, seed=1)
    assert settings == pipe.settings("a fox", image=picture(), steps=5, seed=1)
    resolved = ResolvedRequest.of(settings, manifest, image=picture(), mask=half_mask())
    assert resolved.step_components == ("denoiser",) and resolved.init.mask is not None
    with pytest.raises(ShapeError, match="multiple of 16"):
        complete_request(manifest, "a fox", height=40)
    with pytest.raises(SettingsError, match="no denoiser_cached"):
        ResolvedRequest.of(complete_request(manifest, "a fox", cached_steps=(1,)), manifest)
    lone = msgspec.structs.replace(manifest, components={})
    with pytest.raises(ManifestError, match="has no text_encoder"):
        lone.check_complete(Path("engines"))


def test_settings_of_an_image_do_not_run_without_it(pipe: Pipeline) -> None:
    changed = pipe("a", image=picture(), steps=4, seed=1, strength=0.5)
    assert pipe.run(changed.settings, image=picture()).images == changed.images
    with pytest.raises(SettingsError, match="give the image"):
        pipe.run(changed.settings)


def test_little_strength_changes_little(pipe: Pipeline) -> None:
    given = clean(picture())
    far = [
        np.abs(pipe("a fox", image=picture(), steps=20, strength=s, seed=1).latents - given).max()
        for s in (0.05, 0.3, 1.0)
    ]
    assert far[0] < far[1] < far[2]


def test_the_encoder_is_loaded_for_the_first_image(pipe: Pipeline) -> None:
    pipe("a fox", steps=1)
    assert "vae_encoder" not in pipe.engines
    result = pipe("a fox", image=picture(), steps=2)
    assert "vae_encoder" in pipe.engines and "vae_encoder" in result.timings.stages


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler_ancestral", "heun", "dpmpp_2m"])
def test_the_image_is_kept_outside_of_the_mask(
    pipe: Pipeline, sampler: str, strength: float
) -> None:
    request: dict[str, Any] = {"steps": 4, "strength": strength, "sampler": sampler, "seed": 1}
    result = pipe("a red apple", image=picture(), mask=half_mask(), **request)
    given = clean(picture())
    np.testing.assert_allclose(result.latents[..., :3], given[..., :3], atol=1e-6)
    assert np.abs(result.latents[..., 3:] - given[..., 3:]).min() > 1e-3


@pytest.fixture(scope="module")
def shared_pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Engines whose encoder draws its latents: the variance of its distribution is 1."""
    noisy = ENCODER.replace("low = {-60}", "low = {0}")
    directory = tmp_path_factory.mktemp("rows")
    engines = handmade_engines(directory, "noisy", onnx={**NETWORKS, "vae_encoder": noisy})
    with load(engines, threads=1) as pipeline:
        yield pipeline


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "edm" not in name])
@pytest.mark.parametrize("mask", [None, half_mask()], ids=["image", "mask"])
def test_rows_of_different_requests_are_those_alone(
    shared_pipe: Pipeline, sampler: str, mask: Image.Image | None
) -> None:
    """Each with prompts, a seed and an image of its own, as a server puts them together."""
    shared: dict[str, Any] = {"sampler": sampler, "steps": 16 if "squeezed" in sampler else 4}
    shared |= {"guidance_scale": 3.0, "guidance_rescale": 0.7, "mask": mask}
    shared |= {"strength": 1.0 if sampler == "pndm_prk" else 0.5}
    prompts, negatives, seeds = ["a", "red", "a red"], ["apple", "", "red"], [3, 2**63, -7]
    pictures = [picture(), Image.new("RGB", (48, 32), "navy"), picture().rotate(180)]
    together = shared_pipe(prompts, negative_prompt=negatives, seed=seeds, image=pictures, **shared)
    for row in range(3):
        own: dict[str, Any] = {"negative_prompt": negatives[row], "image": pictures[row]}
        alone = shared_pipe(prompts[row], seed=seeds[row], **own, **shared)
        assert together.latents[row].tobytes() == alone.latents.tobytes()


def test_a_seed_for_each_of_several_images_of_a_prompt(shared_pipe: Pipeline) -> None:
    """Also the sample of the encoder's distribution."""
    pictures = [picture(), Image.new("RGB", (48, 32), "navy")]
    request: dict[str, Any] = {"steps": 4, "strength": 0.5}
    seeds = [1, 2, 3, 1]
    together = shared_pipe(["a", "red"], image=pictures, seed=seeds, images_per_prompt=2, **request)
    for row, (prompt, image) in enumerate(zip(["a", "a", "red", "red"], [0, 0, 1, 1], strict=True)):
        alone = shared_pipe(prompt, image=pictures[image], seed=seeds[row], **request)
        assert together.latents[row].tobytes() == alone.latents.tobytes()


def test_an_image_for_each_prompt(pipe: Pipeline) -> None:
    pictures = [picture(), Image.new("RGB", (48, 32), "navy")]
    request: dict[str, Any] = {"steps": 4, "strength": 0.5, "images_per_prompt": 2}
    result = pipe(["a", "red"], image=pictures, mask=Image.new("L", (48, 32)), **request)
    for row, given in zip(result.latents, [0, 0, 1, 1], strict=True):
        np.testing.assert_allclose(row, clean(pictures[given])[0], atol=1e-6)


def test_two_parts_equal_the_whole_run(pipe: Pipeline) -> None:
    request: dict[str, Any] = {"steps": 8, "seed": 3, "sampler": "euler"}
    whole = pipe("a red apple", **request)
    first = pipe("a red apple", denoising_end=0.5, **request)
    second = pipe("a red apple", image=first.latents, denoising_start=0.5, **request)
    np.testing.assert_allclose(second.latents, whole.latents, rtol=1e-5)
    assert len(first.timings.stages["denoiser"]) + len(second.timings.stages["denoiser"]) == 8


def test_image_modes(pipe: Pipeline) -> None:
    """Grey, transparent and paletted pictures are what they look like."""
    mask = Image.new("L", (64, 64))
    for mode in ("RGBA", "P", "LA", "L"):
        given = picture(64, 64).convert("L").convert(mode)
        request: dict[str, Any] = {"steps": 1, "height": 32, "width": 32}
        result = pipe("a fox", image=given, mask=mask, **request)
        small = (
            picture(64, 64).convert("L").convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
        )
        np.testing.assert_allclose(result.latents, clean(small), atol=1e-2)
    assert to_mask(half_mask().convert("RGBA")).tolist() == to_mask(half_mask()).tolist()


FORMS: list[Any] = [
    picture(),
    [picture()],
    (picture(),),
    np.asarray(picture()),
    np.asarray(picture())[None],
    [np.asarray(picture())],
    np.asarray(picture()) / 255,
    (np.asarray(picture()) / 255).astype(np.float32)[None],
    np.asarray(picture().convert("RGBA")),
    np.asarray(picture()).astype(np.uint16) * 257,
]


@pytest.mark.parametrize("form", range(len(FORMS) + 2))
def test_pictures_are_images_arrays_or_paths(pipe: Pipeline, tmp_path: Path, form: int) -> None:
    picture().save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    image = [*FORMS, path, str(path)][form]
    result = pipe("a fox", image=image, mask=np.zeros((32, 48), bool), steps=2, seed=1)
    np.testing.assert_allclose(result.latents, clean(picture()), atol=1e-6)
    assert result.images[0].size == (48, 32)


def test_masks_are_images_arrays_or_paths(pipe: Pipeline, tmp_path: Path) -> None:
    half_mask().save(tmp_path / "mask.png")
    grey = np.asarray(half_mask())
    request: dict[str, Any] = {"image": picture(), "steps": 2, "seed": 1}
    expected = pipe("a fox", mask=half_mask(), **request).latents.tobytes()
    for mask in (grey, grey > 0, grey[..., None], grey / 255, tmp_path / "mask.png"):
        assert pipe("a fox", mask=mask, **request).latents.tobytes() == expected


# Rejected requests

NAN = np.full((1, 4, 4, 6), np.nan, np.float32)
LATENTS = np.zeros((1, 4, 4, 6), np.float32)

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"image": picture(), "strength": -0.1},
        SettingsError,
        "strength must be a number from 0 to 1",
    ),
    ({"image": picture(), "strength": 1.5}, SettingsError, "strength must be a number from 0 to 1"),
    ({"image": picture(), "strength": float("nan")}, SettingsError, "strength must be a number"),
    ({"image": picture(), "strength": 0.0}, SettingsError, "strength 0 of 4 steps leaves no step"),
    (
        {"image": picture(), "strength": 0.2},
        SettingsError,
        "strength 0.2 of 4 steps leaves no step",
    ),
    ({"strength": 0.5}, SettingsError, "give image too"),
    ({"mask": half_mask()}, SettingsError, "give image too"),
    ({"image": picture(), "mask": half_mask(32)}, ShapeError, "32x32 and the image 48x32"),
    ({"image": picture(), "mask": "mask.png"}, SettingsError, "cannot read mask.png as an image"),
    ({"image": picture(), "mask": 3}, SettingsError, "mask must be a PIL image, a path or .* int"),
    ({"image": "cat.png"}, SettingsError, "cannot read cat.png as an image: No such file"),
    ({"image": ["cat.png"]}, SettingsError, "cannot read cat.png as an image: No such file"),
    ({"image": [1, 2]}, SettingsError, "image must be a PIL image, a path or an array, not int"),
    ({"image": []}, SettingsError, "image is empty"),
    ({"image": 3}, SettingsError, "image must be a PIL image, a path or an array, not int"),
    ({"image": np.zeros((0, 32, 48, 3), np.uint8)}, SettingsError, "image is empty"),
    ({"image": np.zeros((3, 32, 48))}, SettingsError, r"array \(h, w\).* \(3, 32, 48\)"),
    ({"image": Image.new("L", (0, 9))}, SettingsError, "image must have pixels, and is 0x9"),
    ({"image": Image.new("La", (48, 32))}, SettingsError, "cannot read image: conversion"),
    ({"image": [picture()] * 3}, SettingsError, "3 images for 1 prompts"),
    ({"image": picture(8, 8)}, ShapeError, "8x8 pixels, and this model needs at least 16x16"),
    ({"image": picture(), "denoising_start": 0.5}, SettingsError, "continues from latents"),
    ({"image": LATENTS, "mask": half_mask()}, SettingsError, "a mask needs an image"),
    ({"image": LATENTS[0]}, SettingsError, "latents are"),
    ({"image": LATENTS[:, :3]}, ShapeError, r"shape \(1, 3, 4, 6\), .* \(1, 4, 4, 6\)"),
    ({"image": NAN, "denoising_start": 0.5}, SettingsError, "finite"),
    ({"image": LATENTS.astype(int)}, SettingsError, "floating"),
    ({"denoising_start": 0.6, "denoising_end": 0.5}, SettingsError, "must be below"),
    ({"denoising_end": 1.5}, SettingsError, "denoising_end must be a number from 0 to 1"),
    ({"denoising_end": 0.0}, SettingsError, "denoising_end 0"),
    ({"original_size": (1, 2, 3)}, ShapeError, "original_size must be two integers"),
    ({"crop": (-1, 0)}, ShapeError, "crop must be two integers"),
    ({"target_size": 512}, ShapeError, "target_size must be two integers"),
    ({"aesthetic_score": 11}, SettingsError, "aesthetic_score must be a number from 0 to 10"),
]


@pytest.mark.parametrize(("request_", "error", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refuses(
    pipe: Pipeline, request_: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Requests are rejected at once, before a step is requested."""
    with pytest.raises(error, match=message) as caught:
        pipe.stream("a fox", steps=4, **request_)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_engines_without_an_encoder(handmade: Handmade) -> None:
    with load(handmade("plain", onnx=NETWORKS)) as plain:
        with pytest.raises(ManifestError, match="no vae_encoder"):
            plain.stream("a fox", image=picture())


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", None, "cut"])
def test_a_file_that_is_no_picture(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "image.png"
    if content == "cut":
        picture().save(path)
        path.write_bytes(path.read_bytes()[:-60])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"image\.png as an image") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


def test_a_picture_that_was_taken_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture(48, 32).save(tmp_path / "image.jpg", exif=exif)
    assert open_image(tmp_path / "image.jpg").size == (32, 48)


def test_a_picture_that_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(64, 64).save(tmp_path / "image.png")
    for limit in (3000, 1000):  # Pillow warns above the limit, and fails above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(SettingsError, match="as an image"):
            open_image(tmp_path / "image.png")


# The command line


@pytest.fixture
def engines(handmade: Handmade, tmp_path: Path) -> Path:
    picture().save(tmp_path / "in.png")
    half_mask().save(tmp_path / "mask.png")
    half_mask(32, 32).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    return handmade("engines", onnx={**NETWORKS, "vae_encoder": ENCODER})


def run(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "latentforge", "run", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


def test_run_from_a_picture_and_a_mask(engines: Path, tmp_path: Path) -> None:
    request = ["--image", "in.png", "--mask", "mask.png", "--steps", "4", "--seed", "1"]
    result = run(tmp_path, "engines", "a red apple", *request, "-o", "out.png")
    assert result.returncode == 0, result.stderr
    output, image = Image.open(tmp_path / "out.png"), picture()
    assert output.size == image.size
    left = (0, 0, 24, 32)
    error = np.asarray(output.crop(left), np.int32) - np.asarray(image.crop(left), np.int32)
    assert np.abs(error).max() <= 1
    assert json.loads(output.text["latentforge"])["strength"] == 1.0  # type: ignore[attr-defined]


def test_run_with_a_refiner(engines: Path, tmp_path: Path) -> None:
    """The same engines as their own refiner give what they give alone."""
    request = ["engines", "a red apple", "--steps", "5", "--seed", "1", "--sampler", "euler"]
    assert run(tmp_path, *request, "-o", "a.png").returncode == 0
    refine = ["--refiner", "engines", "--refine-from", "0.6", "--low-memory"]
    result = run(tmp_path, *request, *refine, "-o", "b.png")
    assert result.returncode == 0, result.stderr
    a, b = (np.asarray(Image.open(tmp_path / name), np.int32) for name in ("a.png", "b.png"))
    assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "in.png", "--mask", "small.png"], ["mask is 32x32", "48x32"]),
        (["--image", "in.png", "--strength", "1.2"], ["strength", "1.2"]),
        (["--image", "in.png", "--strength", "-1"], ["strength", "-1"]),
        (["--image", "text.png"], ["text.png as an image"]),
        (["--image", "none.png"], ["none.png", "No such file"]),
        (["--image", "engines"], ["engines as an image"]),
        (["--mask", "mask.png"], ["give image too"]),
        (["--refiner", "nowhere"], ["nowhere"]),
        (["--refiner", "engines", "--refine-from", "1"], ["--refine-from", "1"]),
    ],
    ids=" ".join,
)
def test_run_refuses(engines: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(tmp_path, "engines", "a fox", "--steps", "4", *arguments, "-o", "out.png")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("latentforge: ") and all(word in last for word in words)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
