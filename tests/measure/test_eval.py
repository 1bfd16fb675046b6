"""eval end to end: the same requests by all, figures with intervals, and mistakes in one line."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from latentforge.evaluate import EvalRequest, check_preset, evaluate, summary
from latentforge.measure.results import Metric, Results
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.image import to_array
from latentforge.runtime.rng import Generator

NETWORK = """<ir_version: 9, opset_import: ["" : 20]>
m (float[batch, 3, h, w] sample)
    => (float[batch, 3] features, float[batch, 3] logits, float[batch, 3, h, w] map)
{ mean = GlobalAveragePool(sample)  features = Flatten(mean)
  logits = Identity(features)  map = Identity(sample) }"""
QUICK: Any = {"steps": 3}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mean colours as features and logits, and the pixels as a feature map."""
    path = tmp_path_factory.mktemp("network") / "colours.onnx"
    ir.save(ir.from_onnx_text(NETWORK), path)
    return path


def found(results: Results, subject: str) -> Mapping[str, Metric]:
    return {metric.name: metric for metric in results.metrics if metric.subject == subject}


def kept(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.png"))}


def test_the_command_judges_engines_against_the_checkpoint(
    demo_engines: Path, network: Path, tmp_path: Path
) -> None:
    command = ["eval", demo_engines, "--against", "demo", "--network", network, "--images", "3"]
    command += ["--steps", "3", "--json", "results.json"]
    done = subprocess.run(
        [sys.executable, "-m", "latentforge", *map(str, command)],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = Results.read(tmp_path / "results.json")
    assert summary(results) in done.stdout
    assert "--images 3" in results.command and results.settings["steps"] == 3
    ours, eager = found(results, "demo"), found(results, "eager")
    assert [*ours] == ["psnr", "ssim", "perceptual", "fid", "kid", "is", "colour"]
    assert [*eager] == ["is", "colour"]
    assert ours["psnr"].value > 50 and ours["ssim"].value > 0.999
    assert ours["fid"].value < 1e-3 and "under 1,000 images" in ours["fid"].note
    assert all(metric.images == 3 for metric in results.metrics)
    assert all((m.low or 0) <= m.value <= (m.high or 0) for m in results.metrics)
    check_pictures(results)


def check_pictures(results: Results) -> None:
    assert len(results.pictures) == 3
    for index, picture in enumerate(results.pictures):
        assert [*picture.images] == ["eager", "demo"] and [*picture.differences] == ["demo"]
        assert picture.seed == index and picture.psnr["demo"] > 50
        assert all(url.startswith("data:image/") for url in picture.images.values())


def test_pictures_that_are_kept_are_not_drawn_again(demo_engines: Path, tmp_path: Path) -> None:
    def run(images: int, **request: Any) -> Results:
        asked = EvalRequest(images=images, folder=tmp_path / "kept", request={**QUICK, **request})
        return evaluate([demo_engines], asked)

    first, before = run(2), kept(tmp_path)
    again, after = run(3), kept(tmp_path)
    assert before.items() < after.items() and len(after) == 3
    assert again.metrics[0].images == 3 and first.metrics[0].name == "colour"
    Image.new("RGB", (64, 64)).save(tmp_path / "kept" / "demo" / "00001.png")
    assert run(3).metrics == again.metrics  # a picture of unknown origin is drawn anew
    run(3, steps=2)
    assert not kept(tmp_path).items() & after.items()


def test_one_noise_for_all(demo_engines: Path, tmp_path: Path) -> None:
    """The noise of seed 5 gives the picture of seed 5, whatever the seed."""
    np.save(tmp_path / "latents.npy", Generator(5).randn((1, 4, 16, 16)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("owl on a red background\nowl on a red background\n")
    common: dict[str, Any] = {"prompts": prompts, "request": QUICK}
    evaluate([demo_engines], EvalRequest(**common, seed=5, folder=tmp_path / "seeds"))
    noise = EvalRequest(**common, latents=tmp_path / "latents.npy", folder=tmp_path / "noise")
    results = evaluate([demo_engines], noise)
    assert "one initial noise for all" in results.method
    seeds, ours = (
        [to_array([Image.open(path)]) for path in sorted((tmp_path / name).rglob("*.png"))]
        for name in ("seeds", "noise")
    )
    assert np.array_equal(ours[0], seeds[0]) and np.array_equal(ours[1], seeds[0])
    assert not np.array_equal(seeds[0], seeds[1])


def test_engines_against_engines(demo_engines: Path, network: Path) -> None:
    """A set against itself is as near as can be, and the path length is that of both."""
    asked = EvalRequest(
        against=str(demo_engines), images=2, network=str(network), request=QUICK,
        metrics=("psnr", "ppl", "is"), seed=3,
    )  # fmt: skip
    results = evaluate([demo_engines], asked)
    assert [(m.name, m.subject) for m in results.metrics] == [("is", "demo"), ("ppl", "demo")]
    path = found(results, "demo")["ppl"]
    assert path.value > 0 and path.images == 4 and path.note.startswith("median")
    check_preset(results, asked)


def test_statistics_in_place_of_a_reference(
    demo_engines: Path, network: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    asked = EvalRequest(
        images=3, network=str(network), statistics=tmp_path / "statistics.npz", request=QUICK
    )
    fid = found(evaluate([demo_engines], asked), "demo")["fid"]
    assert fid.reference == "statistics" and fid.value > 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"metrics": ("beauty",)}, "no metric 'beauty'; there are psnr"),
    ({"images": 0}, "images must be an integer from 1"),
    ({"preset": "mlperf", "request": QUICK}, "--preset mlperf sets steps itself"),
    ({"metrics": ("psnr",)}, "psnr needs --against"),
    ({"metrics": ("fid",)}, "fid needs a --network"),
    ({"metrics": ("lpips",), "against": "demo"}, "lpips needs --against, and --lpips"),
    ({"metrics": ("clip",)}, "clip needs --clip"),
    ({"metrics": ("retrieval",)}, "retrieval is for the demo"),
    ({"network": "nothing.onnx"}, "nothing.onnx is not a network"),
    ({"statistics": Path("nothing.npz")}, "nothing.npz is not an .npz of mu and sigma"),
    ({"retrieval": Path("nothing")}, "does not hold the demo's training images"),
    ({"prompts": Path("nothing.txt")}, "cannot read prompts"),
    ({"latents": Path("latents.pt"), "metrics": ("colour",)}, "is a pickle"),
    ({"preset": "mlperf"}, "not MLPerf's protocol: 64 captions were given"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_mistakes_are_told(demo_engines: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as raised:
        evaluate([demo_engines], EvalRequest(**given))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_one_image_is_too_few_for_a_distribution(demo_engines: Path, network: Path) -> None:
    with pytest.raises(SettingsError, match="fid needs two images or more"):
        evaluate(
            [demo_engines],
            EvalRequest(against="demo", images=1, network=str(network), metrics=("fid",)),
        )


def test_colours_are_the_demos_alone(demo_engines: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a cat\n")
    with pytest.raises(SettingsError, match="colour is for the demo checkpoint"):
        evaluate([demo_engines], EvalRequest(prompts=prompts, metrics=("colour",)))
    with pytest.raises(SettingsError, match="no metric can be computed"):
        evaluate([demo_engines], EvalRequest(prompts=prompts))


def test_the_protocol_takes_its_captions(demo_engines: Path, tmp_path: Path) -> None:
    path = tmp_path / "captions_source.tsv"
    path.write_text("id\tcaption\n" + "".join(f"{i}\towl {i}\n" for i in range(12)))
    with pytest.raises(SettingsError, match="not MLPerf's protocol: 12 captions"):
        evaluate([demo_engines], EvalRequest(preset="mlperf", prompts=path, images=5000))
