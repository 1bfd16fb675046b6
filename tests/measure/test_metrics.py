"""The metrics of the field have known answers, and say what they can't know."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from latentforge.export.demo import CHECKPOINT
from latentforge.measure.quality import intervals, mlperf
from latentforge.measure.quality.distribution import (
    Statistics,
    clip_score,
    cmmd,
    fid,
    inception_score,
    kid,
)
from latentforge.measure.quality.features import ImageFeatures, OnnxNetwork, extract
from latentforge.measure.quality.inputs import MetricInputs
from latentforge.measure.quality.metrics import Lpips, Perceptual, compare_pairs, decibels
from latentforge.measure.quality.networks import ClipNetwork, EfficientNetLite0, Inception
from latentforge.measure.quality.path_length import path_length, path_lengths
from latentforge.measure.quality.scores import scores
from latentforge.measure.results import Metric
from latentforge.runtime.errors import BackendError, GateError, SettingsError, ShapeError
from latentforge.runtime.image import MAX_PSNR, to_array
from latentforge.runtime.loader import load
from latentforge.runtime.progress import Progress

Array = NDArray[Any]

MEANS = """<ir_version: 9, opset_import: ["" : 20]>
m (float[batch, 3, h, w] sample) => (float[batch, 3] features, float[batch, 3, 1, 1] map)
{ map = GlobalAveragePool(sample)  features = Flatten(map) }"""
ROOTS = """<ir_version: 9, opset_import: ["" : 20]>
m (float[batch, 3, 8, 8] sample) => (float[batch, 192] features)
{ root = Sqrt(sample)  features = Flatten(root) }"""
APART = """<ir_version: 9, opset_import: ["" : 20]>
m (float[batch, 3, h, w] a, float[batch, 3, h, w] b) => (float[batch, 1, 1, 1] distance)
{ apart = Sub(a, b)  square = Mul(apart, apart)
  distance = ReduceMean<keepdims=1>(square, axes)
}"""


def normal(seed: int, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Array:
    return np.random.default_rng(seed).normal(mean, scale, shape)


def pictures(count: int, *, seed: int = 0, side: int = 16) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def saved(text: str, path: Path) -> Path:
    ir.save(ir.from_onnx_text(text), path)
    return path


# intervals


def test_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    """1.96 standard errors on either side, for many normal values."""
    values = normal(0, 2000, mean=5)
    found = intervals.mean(values)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low is not None and found.high is not None
    assert found.value - found.low == pytest.approx(error, rel=0.1)
    assert found.high - found.value == pytest.approx(error, rel=0.1)


def test_intervals_cover_what_they_should() -> None:
    """Of 200 sets with mean 3, the interval has it in about 95 of 100."""
    rng = np.random.default_rng(1)
    found = [intervals.mean(rng.normal(3, 1, 60), seed=seed) for seed in range(200)]
    covered = sum((i.low or 0) <= 3 <= (i.high or 0) for i in found)
    assert 180 <= covered <= 199


def test_interval_of_a_share_is_wilsons() -> None:
    """Wilson's for 8 of 10, by Brown, Cai & DasGupta's formula worked by hand: 0.490 to 0.943."""
    found = intervals.proportion(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, 1e-3))
    sure = intervals.proportion(64, 64)
    assert sure.high == 1 and sure.low == pytest.approx(64 / (64 + 1.959964**2), abs=1e-6)


def test_one_image_has_no_interval() -> None:
    assert intervals.mean(np.array([3.0])).low is None


# distributions


@pytest.mark.parametrize("width", [4, 200])
def test_fid_of_a_set_with_itself(width: int) -> None:
    """Also with fewer images than features, where covariances are singular."""
    features = normal(0, 50, width)
    found = fid(features, features, paired=True)
    assert found.value == pytest.approx(0, abs=1e-4)
    assert found.high == pytest.approx(0, abs=1e-3)


def test_fid_of_two_gaussians_has_a_closed_form() -> None:
    """Of equal axes: |difference of means|² + Σ (difference of deviations)², here 4 + 3 · 1."""
    a, b = normal(0, 60_000, 3), normal(1, 60_000, 3, scale=2)
    b[:, 0] += 2
    assert fid(a, b).value == pytest.approx(7, rel=0.02)
    known = Statistics(mu=np.array([2.0, 0, 0]), sigma=4 * np.eye(3))
    found = fid(a, known)
    assert found.value == pytest.approx(7, rel=0.02)
    assert found.low is not None and found.high is not None
    assert found.low <= 7 <= found.high and found.high - found.low < 0.2


def test_figures_are_those_of_torch_fidelity() -> None:
    """Its 0.4.0 gave these on the same arrays.

    By fid_statistics_to_metric of fid_features_to_statistics, kid_features_to_metric with one
    subset of all 96, and isc_features_to_metric with one split.
    """
    rng = np.random.default_rng(2026)
    a, b = rng.normal(size=(96, 24)), rng.normal(0.2, 1.3, size=(96, 24))
    assert fid(a, b).value == pytest.approx(8.232701731954975, rel=1e-9)
    assert kid(a, b).value == pytest.approx(0.2679366299430961, rel=1e-9)
    assert inception_score(a).value == pytest.approx(1.5434872468857754, rel=1e-9)
    few, others = rng.normal(size=(12, 24)), rng.normal(0.2, 1.3, size=(12, 24))
    assert fid(few, others).value == pytest.approx(38.630636003665145, rel=1e-6)


def test_statistics_of_a_set_stand_for_it() -> None:
    a, b = normal(0, 80, 5), normal(1, 90, 5, mean=0.5)
    known = Statistics(mu=b.mean(axis=0), sigma=np.cov(b, rowvar=False))
    assert fid(a, known).value == pytest.approx(fid(a, b).value, rel=1e-9)


def test_kid_is_unbiased() -> None:
    """Sets of one distribution: on average 0, where a biased estimate is well above."""
    found = [kid(normal(2 * i, 40, 8), normal(2 * i + 1, 40, 8)) for i in range(60)]
    values = np.array([interval.value for interval in found])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert sum((i.low or 0) <= 0 <= (i.high or 0) for i in found) >= 51


def test_kid_of_other_sets_is_sure_of_it() -> None:
    found = kid(normal(0, 100, 8), normal(1, 100, 8, mean=1))
    assert found.low is not None and found.low > 0


def test_inception_score_of_even_and_of_certain_logits() -> None:
    """Knowing nothing scores 1; ten classes, each surely and equally often, score 10."""
    assert inception_score(np.zeros((20, 10))).value == pytest.approx(1)
    certain = np.tile(np.eye(10) * 1000, (3, 1))
    assert inception_score(certain).value == pytest.approx(10, rel=1e-6)


def test_cmmd_of_equal_sets_and_of_opposite_ones() -> None:
    """Unit vectors e and -e under a kernel of sigma 10: 2000 (1 - exp(-4 / 200))."""
    vectors = normal(0, 30, 16)
    assert cmmd(vectors, vectors, paired=True).value == pytest.approx(0, abs=1e-9)
    ones = np.ones((5, 16))
    expected = 2000 * (1 - np.exp(-4 / 200))
    assert cmmd(ones, -3 * ones).value == pytest.approx(expected, rel=1e-9)


def test_clip_score_of_equal_and_of_orthogonal_embeddings() -> None:
    basis = np.eye(4)
    assert clip_score(basis, 7 * basis).value == pytest.approx(100)
    assert clip_score(basis, np.roll(basis, 1, axis=0)).value == 0
    assert clip_score(basis, -basis).value == 0


@pytest.mark.parametrize("metric", [fid, kid, cmmd])
def test_what_cannot_be_compared(metric: Callable[[Array, Array], object]) -> None:
    with pytest.raises(ShapeError, match="2 images or more"):
        metric(np.ones((1, 4)), np.ones((1, 4)))
    with pytest.raises(ShapeError, match="features of 4 and 5 numbers"):
        metric(np.ones((3, 4)), np.ones((3, 5)))


def test_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    kid(normal(0, 10, 4), normal(1, 10, 4))
    inception_score(normal(0, 10, 4))
    assert torch.rand(1) == expected


@pytest.mark.parametrize("content", ["text", "other", "shape"])
def test_statistics_that_are_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "statistics.npz"
    if content == "text":
        path.write_text("mu")
    else:
        np.savez(path, mu=np.ones(3), **{"other": {"x": 1}, "shape": {"sigma": np.eye(2)}}[content])
    with pytest.raises(SettingsError, match="sigma"):
        Statistics.read(path)


# networks


def test_onnx_network_sees_what_its_outputs_are(tmp_path: Path) -> None:
    network = OnnxNetwork(saved(MEANS, tmp_path / "means.onnx"))
    seen = network(to_array(pictures(2)))
    assert seen.features is not None and seen.features.shape == (2, 3)
    assert seen.logits is None and [m.shape for m in seen.maps] == [(2, 3, 1, 1)]


def test_onnx_network_of_a_fixed_size_is_given_that(tmp_path: Path) -> None:
    """An even picture stays even when it is resized; this one's roots are all 0.5."""
    network = OnnxNetwork(saved(ROOTS, tmp_path / "roots.onnx"))
    seen = network(np.full((2, 3, 31, 20), 0.25, np.float32))
    assert seen.features == pytest.approx(np.full((2, 192), 0.5), abs=1e-5)


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    network = OnnxNetwork(saved(ROOTS, tmp_path / "roots.onnx"))  # dark pixels are below 0
    with pytest.raises(BackendError, match="roots's features of these images are not finite"):
        extract(network, pictures(3))


def test_pictures_of_unequal_size_or_number(tmp_path: Path) -> None:
    network = OnnxNetwork(saved(MEANS, tmp_path / "means.onnx"))
    with pytest.raises(ShapeError, match="images of 16x16 and 8x8 pixels"):
        extract(network, [*pictures(1), *pictures(1, side=8)])
    with pytest.raises(ShapeError, match="2 and 3 images cannot be compared"):
        compare_pairs(pictures(2), pictures(3), {})


def test_efficientnet_knows_a_cat_and_a_cup() -> None:
    """ImageNet's 281, 282, 285 are cats, 967 and 968 espresso and cup."""
    from skimage import data

    network = EfficientNetLite0()
    for photo, classes in ((data.chelsea(), {281, 282, 285}), (data.coffee(), {967, 968})):
        seen = network(to_array([Image.fromarray(photo)]))
        assert seen.logits is not None and seen.features is not None
        assert seen.logits[0].argmax() in classes and seen.features.shape == (1, 1280)
        assert [m.shape[1:] for m in seen.maps] == [
            (16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)
        ]  # fmt: skip


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(SettingsError, match="would run code"):
        EfficientNetLite0(tmp_path / "evil.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(SettingsError, match="not an EfficientNet-Lite0: it lacks"):
        EfficientNetLite0(tmp_path / "other.pth")
    with pytest.raises(SettingsError, match="torch-fidelity|run code"):
        Inception(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, with the demo's tokenizer."""
    path = tmp_path_factory.mktemp("clip") / "tiny-clip"
    shutil.copytree(CHECKPOINT / "tokenizer", path)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    demo = json.loads((CHECKPOINT / "text_encoder" / "config.json").read_text())
    known = ("vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings")
    text = {**small, "num_attention_heads": 2, **{name: demo[name] for name in known}}
    vision = {**small, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        path
    )
    return path


def test_clip_embeds_what_transformers_does(clip: Path) -> None:
    """Pictures of the model's own size, so that only the normalization is left to differ."""
    model = CLIPModel.from_pretrained(clip).eval()
    ours = ClipNetwork(str(clip))
    some = pictures(3, side=32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    pixels = (torch.from_numpy(to_array(some)) / 2 + 0.5 - mean) / deviation
    with torch.inference_mode():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
    assert extract(ours, some).features == pytest.approx(expected.numpy(), abs=1e-5)
    both = ours.texts(["owl on a red background", "crab"])
    assert both.shape == (2, 8) and both[1] == pytest.approx(ours.texts(["crab"])[0], abs=1e-5)


def test_no_clip_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="give --clip a folder with config.json"):
        ClipNetwork(str(tmp_path))


# pairs


def test_pairs_have_figures_of_their_own(tmp_path: Path) -> None:
    perceptual = Perceptual(OnnxNetwork(saved(MEANS, tmp_path / "means.onnx")))
    some, others = pictures(20), [*pictures(19), *pictures(1, seed=5)]
    rows = compare_pairs(some, others, {"perceptual": perceptual.each})
    assert {name: len(values) for name, values in rows.items()} == {
        "error": 20, "ssim": 20, "perceptual": 20
    }  # fmt: skip
    assert decibels(rows["error"])[:19] == pytest.approx(np.full(19, MAX_PSNR))
    assert decibels(rows["error"])[19] < 20 and rows["perceptual"][19] > 0
    assert perceptual(to_array(some), to_array(others)) == pytest.approx(
        rows["perceptual"].mean(), rel=1e-5
    )


def test_lpips_is_the_users_file(tmp_path: Path) -> None:
    text = APART.replace("float[batch, 1, 1, 1] distance)\n{", "float[batch, 1, 1, 1] distance)\n{ "
                         "axes = Constant<value_ints=[1, 2, 3]>()")  # fmt: skip
    lpips = Lpips(saved(text, tmp_path / "lpips.onnx"))
    ones = np.ones((2, 3, 8, 8), np.float32)
    assert lpips.each(ones, -ones) == pytest.approx([4, 4])
    with pytest.raises(SettingsError, match="2 of"):
        Lpips(saved(MEANS, tmp_path / "means.onnx"))
    with pytest.raises(SettingsError, match="has no feature maps"):
        Perceptual(OnnxNetwork(saved(ROOTS, tmp_path / "roots.onnx"))).each(ones, ones)


# rows


class Means:
    """The mean colour, as a network."""

    name = "means"

    def __call__(self, given: Array) -> ImageFeatures:
        return ImageFeatures(features=given.mean(axis=(2, 3)), logits=given.mean(axis=(2, 3)) * 50)


def rows(count: int) -> dict[tuple[str, str], Metric]:
    galleries = {"theirs": pictures(count), "ours": pictures(count, seed=1)}
    inputs = MetricInputs(
        features=Means(), accuracies={"colour": lambda gallery, texts: len(gallery) - 1}
    )
    names = ["psnr", "ssim", "fid", "kid", "is", "colour"]
    found = scores(galleries, ["a"] * count, inputs, metrics=names, reference="theirs")
    return {(metric.name, metric.subject): metric for metric in found}


def test_rows_say_of_whom_and_against_whom() -> None:
    found = rows(6)
    assert {name for name, subject in found if subject == "theirs"} == {"is", "colour"}
    assert {name for name, subject in found if subject == "ours"} == {
        "psnr", "ssim", "fid", "kid", "is", "colour"
    }  # fmt: skip
    fid_row = found["fid", "ours"]
    assert (fid_row.reference, fid_row.network, fid_row.images) == ("theirs", "means", 6)
    assert "not comparable with published figures" in fid_row.note
    assert "fewer images" not in fid_row.note
    assert found["colour", "ours"].value == 5 / 6 and found["psnr", "ours"].unit == "dB"


def test_clip_judges_prompts_and_galleries(clip: Path) -> None:
    galleries = {"theirs": pictures(4, side=32), "ours": pictures(4, side=32)}
    inputs = MetricInputs(clip=ClipNetwork(str(clip)))
    assert inputs.available(reference=True) == ["psnr", "ssim", "cmmd", "clip"]
    prompts = ["owl", "crab", "an owl on a red background", "tiger"]
    found = list(scores(galleries, prompts, inputs, metrics=["clip", "cmmd"], reference="theirs"))
    assert [(m.name, m.subject) for m in found] == [
        ("clip", "theirs"), ("clip", "ours"), ("cmmd", "ours")
    ]  # fmt: skip
    assert found[0].value == found[1].value and found[2].value == pytest.approx(0, abs=1e-6)
    assert {m.network for m in found} == {"tiny-clip"}


def test_fewer_images_than_features_is_said() -> None:
    assert "fewer images than the 3 features" in rows(3)["fid", "ours"].note


def test_fid_of_a_thousand_images_by_another_network_is_still_only_its_own() -> None:
    galleries = {"theirs": pictures(1000, side=2), "ours": pictures(1000, seed=1, side=2)}
    (row,) = scores(
        galleries, ["a"] * 1000, MetricInputs(features=Means()), metrics=["fid"], reference="theirs"
    )
    assert row.note == "not comparable with figures of the standard Inception"


# path length


def test_encoding_and_running_on_it_is_running(tiny_engines: Path) -> None:
    with load(tiny_engines) as pipeline:
        for guidance in (1.0, 5.0):
            settings = pipeline.settings(
                ["a red apple", "b"], steps=2, seed=4, guidance_scale=guidance
            )
            rows = pipeline.encode(settings)
            assert {len(array) for array in rows.values()} == {2 if guidance == 1 else 4}
            usual, told = pipeline.run(settings), pipeline.run(settings, conditioning=rows)
            assert np.array_equal(usual.latents, told.latents)
            assert told.timings.stages.keys() < usual.timings.stages.keys()


def test_path_length_between_equal_prompts_is_zero(tiny_engines: Path, tmp_path: Path) -> None:
    distance = Perceptual(OnnxNetwork(saved(MEANS, tmp_path / "means.onnx"))).each
    with load(tiny_engines) as pipeline, Progress(1) as progress:
        same = [pipeline.settings("a", steps=2, seed=seed) for seed in (1, 2)]
        assert not path_lengths(pipeline, same, distance, progress).any()
        other = [same[0], pipeline.settings("red apple b", steps=2, seed=2)]
        lengths = path_lengths(pipeline, other, distance, progress)
        assert (lengths > 0).all()
        assert np.array_equal(lengths, path_lengths(pipeline, other, distance, progress))
        with pytest.raises(SettingsError, match="two images or more"):
            path_lengths(pipeline, same[:1], distance, progress)


def test_path_length_leaves_out_the_extremes() -> None:
    lengths = np.array([*np.ones(198), 1e9, -1e9])
    assert path_length(lengths).value == pytest.approx(1)


# MLPerf


def metric(name: str, value: float) -> Metric:
    return Metric(name=name, subject="ours", value=value, images=5000, better="lower")


def test_the_band_has_two_sides() -> None:
    """The reference's own figures pass; 2 % off does not, on the better side either."""
    mlperf.check_bands([metric("clip", 31.74981837), metric("fid", 23.48046692)])
    for name, value in (("fid", 22.9), ("fid", 24.0), ("clip", 31.6), ("clip", 31.9)):
        with pytest.raises(GateError, match=f"{name} is {value}"):
            mlperf.check_bands([metric(name, value)])
    with pytest.raises(GateError):
        mlperf.check_bands([metric("fid", float("nan"))])


PROTOCOL = {
    "captions": 5000,
    "images": 5000,
    "family": "stable_diffusion_xl",
    "latents": True,
    "metrics": ["fid", "clip"],
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"captions": 12}, "12 captions"),
        ({"images": 64}, "64 images"),
        ({"family": "stable_diffusion"}, "of stable_diffusion, and"),
        ({"latents": False}, "--latents"),
        ({"metrics": ["clip"]}, "--statistics"),
        ({"metrics": ["fid"]}, "--clip"),
    ],
)
def test_what_is_not_the_protocol(change: dict[str, Any], says: str) -> None:
    mlperf.check(**PROTOCOL)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=f"not MLPerf's protocol.*{says}"):
        mlperf.check(**{**PROTOCOL, **change})


def test_captions_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "captions_source.tsv"
    path.write_text(
        'id\timage_id\tcaption\n1\t7\tA "red" apple.\n2\t8\t An owl \n', encoding="utf-8"
    )
    assert mlperf.read_captions(path) == ['A "red" apple.', "An owl"]
    path.write_text("id\ttext\n1\tA\n")
    with pytest.raises(SettingsError, match="no captions in a column named caption"):
        mlperf.read_captions(path)


def test_latents_are_one_array(tmp_path: Path) -> None:
    path = tmp_path / "latents.npy"
    np.save(path, normal(0, 1, 4, 8, 8))
    assert mlperf.read_latents(path).dtype == np.float32
    for wrong in (normal(0, 2, 4, 8, 8), np.full((1, 4, 8, 8), np.nan), np.ones((1, 4, 8, 8), int)):
        np.save(path, wrong)
        with pytest.raises(SettingsError, match="latents"):
            mlperf.read_latents(path)
    with pytest.raises(SettingsError, match="is a pickle"):
        mlperf.read_latents(tmp_path / "latents.pt")
