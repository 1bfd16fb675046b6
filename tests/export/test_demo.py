"""The demo checkpoint and ``latentforge demo``."""

import json
from pathlib import Path

import pytest

import latentforge
from latentforge.demo import run_demo
from latentforge.export.demo import CHECKPOINT, GUIDANCE, NAMES, prompts
from latentforge.export.demo.score import border, parse
from latentforge.measure.results import Results
from latentforge.runtime.manifest import Manifest


def test_is_small_and_without_pickles() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 32e6
    assert not {path.suffix for path in files} & {".bin", ".ckpt", ".pt", ".pkl"}


def test_names_are_many_and_distinct() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 150


def test_defaults_are_those_of_the_scores(demo_engines: Path) -> None:
    sidecar = json.loads((CHECKPOINT / "latentforge.json").read_text())
    assert sidecar["defaults"]["guidance_scale"] == GUIDANCE
    defaults = Manifest.read(demo_engines).defaults
    assert (defaults.sampler, defaults.steps) == ("ddim", 20)
    assert defaults.guidance_scale == GUIDANCE


def test_background_has_the_named_color(demo_engines: Path) -> None:
    """The complete scores need the training images; the color needs only the prompt."""
    texts = prompts(16, seed=5)
    with latentforge.load(demo_engines) as pipe:
        images = pipe(texts, seed=1).images
    right = [border(image) == parse(text)[1] for image, text in zip(images, texts, strict=True)]
    assert sum(right) >= 15


def test_the_demo_leaves_engines_sheet_results_and_page(
    quick_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (quick_demo / "manifest.json").read_bytes()
    page = run_demo(tmp_path, images=2, repeats=1)
    assert page == tmp_path / "index.html"
    assert {path.name for path in tmp_path.iterdir()} == {
        "bench.json", "contact-sheet.png", "engines", "index.html",
    }  # fmt: skip
    assert (quick_demo / "manifest.json").read_bytes() == before  # current engines are used again
    results = Results.read(tmp_path / "bench.json")
    assert [entry.status for entry in results.entries] == ["ok", "ok"]
    assert all(picture.psnr["engines"] > 40 for picture in results.pictures)
    assert len(results.pictures) == 2 and "class A" in capsys.readouterr().out
