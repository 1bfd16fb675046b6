"""Images of students without training, and their comparison with the teacher's."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.runtime.loader import load
from latentforge.train.search.page import render_search
from latentforge.train.search.search_record import (
    EqualLatencyPair,
    ModelCheck,
    SearchPoint,
    SearchRecord,
)
from latentforge.train.search.states import record_states
from latentforge.train.search.student_errors import ErrorFile, StudentErrors
from latentforge.train.search.student_images import StudentImages, error_ratio
from latentforge.train.search.teacher import Teacher
from latentforge.train.search.variants import WHOLE

PROMPTS = ("a red apple", "a blue boat")
SETTINGS = {"steps": 2, "sampler": "ddim"}


def test_images_are_those_of_the_deployed_loop(
    tiny_checkpoint: Path, tiny_engines: Path, tmp_path: Path
) -> None:
    teacher = Teacher.open(str(tiny_checkpoint))
    states = record_states(tiny_engines, PROMPTS[:1], SETTINGS, lambda *_: None)
    file, importance = ErrorFile(tmp_path / "errors"), teacher.importance(states)
    errors = StudentErrors(teacher.plan, teacher.network, importance, states, file)
    images = StudentImages(tiny_engines, errors, PROMPTS, SETTINGS)
    whole = images(WHOLE)
    assert not whole.latents.any() and not whole.pixels.any()
    with load(tiny_engines) as pipeline:
        expected = pipeline(list(PROMPTS), seed=[10_000, 10_001], **SETTINGS).images
    for image, other in zip(whole.images, expected, strict=True):
        np.testing.assert_allclose(np.asarray(image, int), np.asarray(other, int), atol=1)
    half = images(SearchedStructure.of({teacher.sites[0].name: "half"}, teacher.sites))
    drops = {s.name: s.choices[-1] for s in teacher.sites if s.kind == "resnet"}
    small = images(SearchedStructure.of(drops, teacher.sites))
    assert (half.latents > 0).all() and half.latents.mean() < small.latents.mean()
    assert small.pixels.shape == (2,) and (small.pixels > 0).all()


def test_a_ratio_of_errors_is_paired() -> None:
    theirs = np.random.default_rng(0).lognormal(0.0, 2.0, 12)
    ratio = error_ratio(0.5 * theirs, theirs)
    assert ratio.low is not None and ratio.high is not None
    assert ratio.value == pytest.approx(0.5) and ratio.high - ratio.low < 1e-9
    other = error_ratio(theirs[::-1].copy(), theirs)
    assert other.low is not None and other.high is not None and other.low < 1 < other.high
    assert error_ratio(theirs[:1], theirs[:1]).low is None


def test_the_page_shows_matches_and_images(tiny_engines: Path) -> None:
    with load(tiny_engines) as pipeline:
        images = pipeline(PROMPTS[0], seed=0, **SETTINGS).images
    ratio = error_ratio(np.array([0.2, 0.3]), np.array([0.8, 0.7]))
    point = SearchPoint(
        name="teacher", kind="teacher", choices={}, error=0.0, cost=2.0, measured=2.0, parameters=9
    )
    check = ModelCheck.of([(1.0, 1.0), (2.0, 2.1)], "a note")
    record = SearchRecord(
        checkpoint="tiny",
        sha256="0" * 64,
        request={},
        setting={},
        machine={},
        states="2 states",
        points=(point, *(_renamed(point, n) for n in ("student", "uniform pruning"))),
        matches=(
            EqualLatencyPair(
                baseline="uniform pruning", searched="student", latents=ratio, pixels=None
            ),
        ),
        images=2,
        latency=check,
        errors=check,
        words="all kept",
        seconds=1.0,
    )
    page = render_search(record, {"student": images})
    assert "At equal measured latency" in page and "over 2 images" in page
    assert "0.33 (0.25 to 0.43)" in page and page.count("data:image/") == 1


def _renamed(point: SearchPoint, name: str) -> SearchPoint:
    return SearchPoint(
        name=name,
        kind="chosen" if name == "student" else "baseline",
        choices={},
        error=0.5,
        cost=1.0,
        measured=1.0,
        parameters=point.parameters,
    )
