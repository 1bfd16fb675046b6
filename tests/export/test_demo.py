"""The embedded checkpoint: complete, small, and it draws what it is asked to."""

import json
from pathlib import Path

import latentforge
from latentforge.export.demo import CHECKPOINT, GUIDANCE, NAMES, prompts
from latentforge.export.demo.score import border, parse
from latentforge.runtime.manifest import Manifest


def test_is_small_and_without_pickles() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 32e6
    assert not {path.suffix for path in files} & {".bin", ".ckpt", ".pt", ".pkl"}


def test_knows_enough_names() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 150


def test_defaults_are_those_it_was_scored_with(demo_engines: Path) -> None:
    sidecar = json.loads((CHECKPOINT / "latentforge.json").read_text())
    assert sidecar["defaults"]["guidance_scale"] == GUIDANCE
    defaults = Manifest.read(demo_engines).defaults
    assert (defaults.sampler, defaults.steps) == ("ddim", 20)
    assert defaults.guidance_scale == GUIDANCE


def test_background_has_the_color_asked_for(demo_engines: Path) -> None:
    """The scores in full need the training pictures; the colour needs only the prompt."""
    texts = prompts(16, seed=5)
    with latentforge.load(demo_engines) as pipe:
        images = pipe(texts, seed=1).images
    right = [border(image) == parse(text)[1] for image, text in zip(images, texts, strict=True)]
    assert sum(right) >= 15
