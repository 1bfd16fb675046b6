"""The whole loop, on engines so simple that the result is known in closed form."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXT_ENCODER, Handmade
from numpy.typing import NDArray

import latentforge
from latentforge.runtime.errors import BackendError, ManifestError, SettingsError, ShapeError
from latentforge.runtime.loader import load
from latentforge.runtime.manifest import Latent, RequestDefaults
from latentforge.runtime.pipeline import Pipeline
from latentforge.runtime.rng import Generator
from latentforge.runtime.sampling import SAMPLERS
from latentforge.runtime.tensor import Feeds

Array = NDArray[np.floating]

# The predicted noise is the sample times the mean of the embedding, less one.
UNET = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, h, w] sample, float[1] timestep, float[batch, 8, 2] encoder_hidden_states)
  => (float[batch, 4, h, w] out_sample)
<float one = {1}, int64[3] axes = {1, 2, 3}>
{
  mean = ReduceMean<axes = [1, 2], keepdims = 0>(encoder_hidden_states)
  shifted = Sub(mean, one)
  factor = Unsqueeze(shifted, axes)
  out_sample = Mul(sample, factor)
}"""

# Pixels are the first three channels, eight times enlarged.
DECODER = """<ir_version: 9, opset_import: ["" : 17]>
m (float[batch, 4, h, w] latent_sample) => (float[batch, 3, hh, ww] sample)
<int64[1] start = {0}, int64[1] end = {3}, int64[1] axis = {1}, float[4] scales = {1, 1, 8, 8}>
{
  rgb = Slice(latent_sample, start, end, axis)
  sample = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",
    nearest_mode = "floor">(rgb, , scales)
}"""

NETWORKS = {"text_encoder": TEXT_ENCODER, "denoiser": UNET, "vae_decoder": DECODER}
APPLE = [1, 3, 4, 5, 2, 2, 2, 2]  # "a red apple"
EMPTY = [1, 2, 2, 2, 2, 2, 2, 2]


@pytest.fixture
def still(handmade: Handmade) -> Pipeline:
    """A pipeline whose engines compute nothing."""
    return load(handmade())


@pytest.fixture
def simple(handmade: Handmade) -> Pipeline:
    """A pipeline of the networks above."""
    pytest.importorskip("onnxruntime")
    return load(handmade(onnx=NETWORKS), threads=1)


def noise(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.asarray(Generator(seed).randn(shape), np.float32)


def factor(ids: list[int]) -> float:
    """Return the factor of the sample in UNET for a prompt of these tokens."""
    return float(np.mean(ids)) / 20 - 1


def ddim(
    pipe: Pipeline, factors: list[float], steps: int, seed: int, shape: tuple[int, ...]
) -> Array:
    """x' = alpha' (x - sigma e) / alpha + sigma' e, with e = factor * x for each row."""
    x = noise(seed, shape).astype(np.float64)
    f = np.array(factors).reshape(-1, 1, 1, 1)
    for start, end in SAMPLERS["ddim"].plan(pipe.manifest.schedule, steps).intervals:
        x = x * (end.alpha * (1 - start.sigma * f) / start.alpha + end.sigma * f)
    return x


def test_load_returns_a_pipeline(handmade: Handmade) -> None:
    with latentforge.load(str(handmade())) as pipe:
        assert isinstance(pipe, latentforge.Pipeline)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_network_that_outputs_zero(handmade: Handmade, prediction: str) -> None:
    pipe = load(handmade(prediction=prediction))
    result = pipe("a red apple", steps=6, seed=3)
    expected = noise(3, (1, 4, 4, 6)).astype(np.float64)
    for start, end in SAMPLERS["ddim"].plan(pipe.manifest.schedule, 6).intervals:
        if prediction == "epsilon":  # the clean latent is x / alpha
            expected *= end.alpha / start.alpha
        else:  # a rotation, seen from the side
            expected *= end.alpha * start.alpha + end.sigma * start.sigma
    np.testing.assert_allclose(result.latents, expected, rtol=2e-5)
    assert result.images[0].size == (48, 32)
    assert result.images[0].getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_without_guidance(simple: Pipeline, steps: int) -> None:
    result = simple("a red apple", steps=steps, seed=5, guidance_scale=1)
    expected = ddim(simple, [factor(APPLE)], steps, 5, (1, 4, 4, 6))
    np.testing.assert_allclose(result.latents, expected, rtol=1e-4, atol=1e-5)


def test_with_guidance(simple: Pipeline) -> None:
    result = simple("a red apple", steps=3, seed=5, guidance_scale=3)
    positive, negative = factor(APPLE), factor(EMPTY)
    guided = negative + 3 * (positive - negative)
    expected = ddim(simple, [guided], 3, 5, (1, 4, 4, 6))
    np.testing.assert_allclose(result.latents, expected, rtol=1e-4, atol=1e-5)


def test_with_rescaled_guidance(simple: Pipeline) -> None:
    result = simple("a red apple", steps=3, seed=5, guidance_scale=3, guidance_rescale=0.7)
    positive, negative = factor(APPLE), factor(EMPTY)
    guided = negative + 3 * (positive - negative)
    rescaled = guided * (0.7 * abs(positive / guided) + 0.3)
    expected = ddim(simple, [rescaled], 3, 5, (1, 4, 4, 6))
    np.testing.assert_allclose(result.latents, expected, rtol=1e-4, atol=1e-5)


def test_the_negative_prompt_replaces_the_empty_one(simple: Pipeline) -> None:
    settings: dict[str, Any] = {"steps": 3, "seed": 5, "guidance_scale": 2}
    same = simple("a red apple", negative_prompt="a red apple", **settings)
    alone = simple("a red apple", **{**settings, "guidance_scale": 1})
    np.testing.assert_allclose(same.latents, alone.latents, rtol=1e-5, atol=1e-6)
    other = simple("a red apple", **settings)
    assert np.abs(other.latents - alone.latents).max() > 0.01


def test_prompts_and_images_come_in_order(simple: Pipeline) -> None:
    prompts = ["a red apple", "a", "?"]
    result = simple(prompts, images_per_prompt=2, negative_prompt=["", "a", "red"], steps=2, seed=9)
    positive = [APPLE, [1, 3, 2, 2, 2, 2, 2, 2], [1, 0, 2, 2, 2, 2, 2, 2]]
    negative = [EMPTY, [1, 3, 2, 2, 2, 2, 2, 2], [1, 4, 2, 2, 2, 2, 2, 2]]
    guided = [
        factor(n) + 7.5 * (factor(p) - factor(n)) for p, n in zip(positive, negative, strict=True)
    ]
    rows = [value for value in guided for _ in range(2)]
    expected = ddim(simple, rows, 2, 9, (6, 4, 4, 6))
    np.testing.assert_allclose(result.latents, expected, rtol=1e-4, atol=1e-4)
    assert len(result.images) == 6 and result.settings.count == 6


def test_images_are_the_scaled_latents(simple: Pipeline) -> None:
    result = simple("a red apple", steps=2, seed=5, guidance_scale=1)
    pixels = np.asarray(result.images[0], np.float32)[::8, ::8] / 127.5 - 1
    shown = np.clip(result.latents[0, :3] / 0.5, -1, 1).transpose(1, 2, 0)
    np.testing.assert_allclose(pixels, shown, atol=0.005)


# Engines of a fixed size


def fixed(directory: Path, batch: int) -> Path:
    """Restrict the denoiser in the manifest to this batch and to one size."""
    content = json.loads((directory / "manifest.json").read_text())
    sizes = {"batch": batch, "latent_height": 4, "latent_width": 6}
    part = content["components"]["denoiser"]
    for spec in (*part["inputs"].values(), *part["outputs"].values()):
        spec["shape"] = [sizes.get(size, size) for size in spec["shape"]]
    (directory / "manifest.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_engines_of_a_fixed_batch_serve_any_request(handmade: Handmade, batch: int) -> None:
    pytest.importorskip("onnxruntime")
    free = load(handmade("free", onnx=NETWORKS), threads=1)
    bound = load(fixed(handmade("fixed", onnx=NETWORKS), batch), threads=1)
    for prompts in (["a"], ["a", "red", "apple"]):
        settings: dict[str, Any] = {"steps": 2, "seed": 1}
        result, expected = bound(prompts, **settings), free(prompts, **settings)
        np.testing.assert_allclose(result.latents, expected.latents, rtol=1e-6, atol=1e-6)
    with pytest.raises(ShapeError, match="make images of 32x48 pixels .* not 64x48"):
        bound("a", height=64)
    with pytest.raises(ShapeError, match="make images of 32x48 pixels .* not 32x32"):
        bound("a", width=32)


def test_a_row_at_a_time_gives_the_same(simple: Pipeline) -> None:
    frugal = load(simple.directory, threads=1, max_rows=1)
    result, expected = (p(["a", "red"], steps=2, seed=1) for p in (frugal, simple))
    np.testing.assert_allclose(result.latents, expected.latents, rtol=1e-6, atol=1e-6)
    with pytest.raises(SettingsError, match="max_rows"):
        load(simple.directory, max_rows=0)


# Steps


def test_stream_gives_every_step(simple: Pipeline) -> None:
    steps = list(simple.stream("a red apple", steps=5, seed=2))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert {step.count for step in steps} == {5}
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True) and 0 <= sigmas[-1] < sigmas[0] <= 1
    for step in steps:
        assert step.latents.shape == step.denoised.shape == (1, 4, 4, 6)
    assert len({step.latents.tobytes() for step in steps}) == 5  # no step is overwritten
    whole = simple("a red apple", steps=5, seed=2)
    np.testing.assert_array_equal(steps[-1].latents, whole.latents)


def test_a_step_has_a_preview(simple: Pipeline) -> None:
    step = next(simple.stream("a red apple", steps=3, seed=2, images_per_prompt=2))
    first, second = step.preview()
    assert first.size == second.size == (48, 32)
    shown = np.clip(step.denoised[0, :3] / 0.5, -1, 1).transpose(1, 2, 0)
    pixels = np.asarray(first, np.float32)[::8, ::8] / 127.5 - 1
    np.testing.assert_allclose(pixels, shown, atol=0.005)
    result = step.result()
    np.testing.assert_array_equal(result.latents, step.latents)
    assert result.settings.steps == 3 and result.seed == 2


def test_nothing_is_computed_ahead_of_the_caller(
    still: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    session = still.engines["denoiser"].session
    original = session.run

    def counted(feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        runs.append(1)
        return original(feeds)

    monkeypatch.setattr(session, "run", counted)
    stream = still.stream("a", steps=10)
    assert runs == []
    next(stream), next(stream)
    assert len(runs) == 2
    stream.close()  # type: ignore[attr-defined]
    assert len(runs) == 2


def test_settings_are_checked_before_the_first_step(still: Pipeline) -> None:
    with pytest.raises(SettingsError, match="steps"):
        still.stream("a", steps=0)
    with pytest.raises(SettingsError, match="no setting"):
        still.stream("a", colour="red")  # type: ignore[call-arg]
    with pytest.raises(ShapeError, match="height must be a multiple of 16 for this model, not 40"):
        still.stream("a", height=40)


# Seeds


def test_a_seed_determines_the_image(simple: Pipeline) -> None:
    once, again, other = (simple("a red apple", steps=3, seed=seed) for seed in (1, 1, 2))
    assert once.latents.tobytes() == again.latents.tobytes()
    assert once.images[0].tobytes() == again.images[0].tobytes()
    assert once.latents.tobytes() != other.latents.tobytes()


def test_a_random_seed_is_recorded(simple: Pipeline) -> None:
    first, second = simple("a", steps=2), simple("a", steps=2)
    assert first.seed != second.seed
    again = simple("a", steps=2, seed=first.seed)
    assert again.latents.tobytes() == first.latents.tobytes()


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "edm" not in name])
def test_every_sampler_repeats_itself(simple: Pipeline, sampler: str) -> None:
    steps = 16 if sampler.startswith("squeezed") else 4
    settings: dict[str, Any] = {"steps": steps, "seed": 7, "sampler": sampler, "guidance_scale": 1}
    first, second = (simple("a red apple", **settings) for _ in range(2))
    assert np.isfinite(first.latents).all()
    assert first.latents.tobytes() == second.latents.tobytes()


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "edm" not in name])
def test_a_seed_for_each_image_draws_it_as_alone(simple: Pipeline, sampler: str) -> None:
    steps = 16 if sampler.startswith("squeezed") else 4
    settings: dict[str, Any] = {"steps": steps, "sampler": sampler, "guidance_scale": 3}
    texts, seeds = {"negative_prompt": ["apple", "a"]}, [3, 2**63, 3, -7]
    result = simple(["a", "red"], seed=seeds, images_per_prompt=2, **texts, **settings)
    requests = [("a", 3, "apple"), ("a", 2**63, "apple"), ("red", 3, "a"), ("red", -7, "a")]
    alone = [
        simple(prompt, seed=seed, negative_prompt=negative, **settings)
        for prompt, seed, negative in requests
    ]
    assert result.seed == (3, 2**63, 3, -7)
    for row, expected in zip(result.latents, alone, strict=True):
        assert row.tobytes() == expected.latents.tobytes()


# Sharing, closing, describing


def test_threads_share_a_pipeline(simple: Pipeline) -> None:
    alone = [simple("a red apple", steps=3, seed=seed).latents.tobytes() for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        runs = pool.map(lambda seed: simple("a red apple", steps=3, seed=seed), range(8))
        assert [run.latents.tobytes() for run in runs] == alone


def test_two_streams_do_not_interfere(simple: Pipeline) -> None:
    alone = simple("a red apple", steps=3, seed=1).latents.tobytes()
    pairs = zip(
        simple.stream("a red apple", steps=3, seed=1),
        simple.stream("a", steps=3, seed=2),
        strict=True,
    )
    *_, (last, _) = pairs
    assert last.latents.tobytes() == alone


def test_leaving_the_block_frees_the_engines(handmade: Handmade) -> None:
    with load(handmade()) as pipe:
        pipe("a", steps=1)
        stream = pipe.stream("a", steps=3)
        next(stream)
    with pytest.raises(BackendError, match="is closed"):
        next(stream)
    with pytest.raises(BackendError, match="is closed"):
        pipe("a", steps=1)
    pipe.close()


def test_repr(still: Pipeline) -> None:
    assert repr(still) == (
        "<Pipeline handmade (stable_diffusion) denoiser=null/fp32 "
        "text_encoder=null/fp32 vae_decoder=null/fp32>"
    )


def test_timings_by_stage(simple: Pipeline) -> None:
    timings = simple("a red apple", steps=3).timings
    assert {name: len(calls) for name, calls in timings.stages.items()} == {
        "text_encoder": 1,
        "denoiser": 3,
        "vae_decoder": 1,
    }
    assert 0 < sum(timings.seconds.values()) == pytest.approx(timings.total)


def test_defaults_come_from_the_manifest(handmade: Handmade) -> None:
    defaults = RequestDefaults(
        sampler="euler", steps=2, guidance_scale=1.0, guidance_rescale=0.0, height=16, width=32
    )
    result = load(handmade(defaults=defaults))("a")
    assert result.settings.sampler == "euler" and result.settings.steps == 2
    assert result.latents.shape == (1, 4, 2, 4)


# Directories that cannot be used


def test_a_directory_without_a_component(handmade: Handmade) -> None:
    directory = handmade()
    content = json.loads((directory / "manifest.json").read_text())
    del content["components"]["vae_decoder"]
    (directory / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="no vae_decoder"):
        load(directory)


def test_an_unknown_option(handmade: Handmade) -> None:
    with pytest.raises(SettingsError, match="no backend option 'turbo'"):
        load(handmade(), turbo=True)


def test_a_network_that_gives_nan(handmade: Handmade) -> None:
    pytest.importorskip("onnxruntime")
    broken = UNET.replace("Mul(sample, factor)", "Div(sample, zero)")
    broken = broken.replace("float one = {1}", "float one = {1}, float zero = {0}")
    pipe = load(handmade(onnx={"denoiser": broken}))
    with pytest.raises(BackendError, match="denoiser: output out_sample holds NaN or infinity"):
        pipe("a", steps=2, seed=0)


def test_a_latent_space_of_other_sides(handmade: Handmade) -> None:
    pipe = load(handmade(latent=Latent(channels=4, scaling_factor=0.5, downscale=4, multiple=4)))
    *_, last = pipe.stream("a", steps=1)
    assert last.latents.shape == (1, 4, 8, 12)
    with pytest.raises(BackendError, match=r"output sample is float32\[1, 3, 64, 96\], expected "):
        pipe("a", steps=1)  # this decoder enlarges by 8
