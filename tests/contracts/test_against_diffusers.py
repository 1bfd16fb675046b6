"""Images of the engines equal those of diffusers, for the same seed and every sampler."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiers import further

import latentforge
from latentforge.runtime.image import psnr, to_array

pytest.importorskip("diffusers")

# The others are compared by their own files: see test_scheduler_files.py.
QUICK = ("ddim", "euler_ancestral", "dpmpp_2m", "unipc", "squeezed_10")
NAMES = (
    *("ddim", "pndm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_karras"),
    *("dpmpp_2m_sde", "dpmpp_2m_sde_karras", "unipc", "squeezed_10", "squeezed_11", "lcm"),
)
STEPS = {"lcm": 4, "squeezed_10": 16, "squeezed_11": 16}
STOCHASTIC = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm")


@pytest.fixture(scope="module")
def pipe(demo_engines: Path) -> Iterator[latentforge.Pipeline]:
    with latentforge.load(demo_engines) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def eager() -> Any:
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.reference.eager import EagerPipeline

    return EagerPipeline(open_checkpoint("demo"))


@pytest.fixture(scope="module")
def tiny_eager(tiny_checkpoint: Path) -> Any:
    from latentforge.export.checkpoint import open_checkpoint
    from latentforge.export.reference.eager import EagerPipeline

    return EagerPipeline(open_checkpoint(str(tiny_checkpoint)))


def distance(pipe: latentforge.Pipeline, eager: Any, **request: Any) -> float:
    """Return the PSNR of the worst image of a request, in dB."""
    prompts = request.pop("prompts", ["red apple on a blue background", "owl"])
    ours = pipe(prompts, **request)
    reference = eager(ours.settings)
    pairs = zip(reference.images, ours.images, strict=True)
    return min(psnr(to_array([a]), to_array([b]), peak=2.0) for a, b in pairs)


@pytest.mark.parametrize("sampler", [*QUICK, *further(*(n for n in NAMES if n not in QUICK))])
def test_same_image(pipe: latentforge.Pipeline, eager: Any, sampler: str) -> None:
    """Of two images where each draws noise of its own; with epsilon prediction always."""
    steps = STEPS.get(sampler, 8)
    request: dict[str, Any] = {} if sampler in STOCHASTIC else {"prompts": ["owl"]}
    assert distance(pipe, eager, sampler=sampler, steps=steps, seed=3, **request) >= 40


@pytest.mark.parametrize("sampler", NAMES)
def test_same_image_with_epsilon_prediction(
    tiny_engines: Path, tiny_eager: Any, sampler: str
) -> None:
    """The tiny checkpoint predicts epsilon and has Stable Diffusion 1.5's scheduler file."""
    with latentforge.load(tiny_engines) as pipeline:
        steps = STEPS.get(sampler, 6)
        assert distance(pipeline, tiny_eager, sampler=sampler, steps=steps, seed=3) >= 40


@pytest.mark.parametrize(
    "request_",
    [
        {"negative_prompt": "red", "guidance_scale": 7.5},
        {"guidance_rescale": 0.7},
        {"guidance_scale": 1.0},
        {"images_per_prompt": 2, "sampler": "euler_ancestral"},
        {"height": 96, "width": 48},
        {"height": 72, "width": 64},
        {"prompts": [""], "steps": 1},
        {"seed": -1},
    ],
    ids=str,
)
def test_same_image_for_various_requests(
    pipe: latentforge.Pipeline, eager: Any, request_: dict[str, Any]
) -> None:
    assert distance(pipe, eager, **{"steps": 4, "seed": 5, **request_}) >= 40


def test_another_seed_is_another_image(tiny_engines: Path) -> None:
    """This gives the figures above a meaning. (The demo's images hardly depend on the seed.)"""
    with latentforge.load(tiny_engines) as pipeline:
        a, b = (pipeline("owl", steps=4, seed=seed) for seed in (1, 2))
    assert psnr(to_array(a.images), to_array(b.images), peak=2.0) < 30


def test_another_prompt_is_another_image(pipe: latentforge.Pipeline) -> None:
    a, b = (pipe(text, steps=4, seed=1) for text in ("owl", "carrot"))
    assert psnr(to_array(a.images), to_array(b.images), peak=2.0) < 20
