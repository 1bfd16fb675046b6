"""States of a teacher's runs, and errors of students over them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("diffusers", exc_type=ImportError)

from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.errors import CheckpointError, SettingsError
from latentforge.train.search.search_record import ModelCheck
from latentforge.train.search.states import State, States, _weight, record_states
from latentforge.train.search.student_errors import ErrorFile, StudentErrors, measure_scores
from latentforge.train.search.teacher import Teacher

WHOLE = SearchedStructure(choices={})
STEPS = 3


def ignore(*_: object) -> None:
    """Show no progress."""


@pytest.fixture(scope="module")
def states(tiny_engines: Path) -> States:
    settings = {"steps": STEPS, "sampler": "ddim"}
    return record_states(tiny_engines, ["a red apple", "a tree"], settings, ignore)


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Path) -> Teacher:
    return Teacher.open(str(tiny_checkpoint))


def errors(teacher: Teacher, states: States, path: Path) -> StudentErrors:
    importance = teacher.importance(states)
    return StudentErrors(teacher.plan, teacher.network, importance, states, ErrorFile(path))


def test_every_step_gives_a_guided_state(states: States) -> None:
    assert len(states.states) == STEPS and states.guidance.rows == 2
    assert sum(state.weight for state in states.states) == pytest.approx(1)
    for state in states.states:
        assert len(state.feeds["sample"]) == 4 and len(state.prediction) == 2
    timesteps = [float(np.ravel(state.feeds["timestep"])[0]) for state in states.states]
    assert timesteps == sorted(timesteps, reverse=True)


def test_states_are_kept_as_they_are(states: States, tmp_path: Path) -> None:
    states.write(tmp_path / "states.npz")
    again = States.read(tmp_path / "states.npz")
    assert again.digest == states.digest and again.guidance == states.guidance
    content = (tmp_path / "states.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        States.read(tmp_path / "half.npz")


def test_fewer_states_stand_for_all(states: States) -> None:
    fewer = states.fewer(2)
    assert len(fewer.states) == 2 and states.fewer(99) is states
    assert sum(state.weight for state in fewer.states) == pytest.approx(1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_how_far_ddim_moves(prediction: Any) -> None:
    """A step of diffusers' own scheduler, with and without an error of the prediction."""
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[3]
    alphas = scheduler.alphas_cumprod[timestep], scheduler.alphas_cumprod[timestep - 100]
    x, output = torch.ones(1), torch.full((1,), 0.3)
    moved = [scheduler.step(out, timestep, x).prev_sample for out in (output, output + 1)]
    start, end = (math.sqrt(1 - alpha) for alpha in alphas)
    weight = _weight(start, end, float(timestep), prediction)
    assert weight == pytest.approx(float(moved[1] - moved[0]) ** 2, rel=1e-4)


def test_the_error_is_relative_guided_and_weighted() -> None:
    guidance = Guidance(rows=2, scale=3.0)
    shape = (1, 1, 2, 2)
    states = States(
        states=tuple(
            State(feeds={}, prediction=np.full(shape, size, np.float32), weight=weight)
            for size, weight in ((1.0, 0.25), (2.0, 0.75))
        ),
        guidance=guidance,
    )

    def outputs(*guided: float) -> Iterator[NDArray[np.float32]]:
        for value in guided:
            rows = np.zeros((2, *shape[1:]), np.float32)
            rows[1] = value / guidance.scale
            yield rows

    assert states.error(outputs(1.0, 2.0)) == pytest.approx(0)
    assert states.error(outputs(1.5, 2.0)) == pytest.approx(0.25 * 0.25)
    assert states.error(outputs(1.0, 1.0)) == pytest.approx(0.75 * 0.25)
    assert states.error(outputs(float("nan"), 2.0)) == math.inf


def test_the_teacher_has_no_error(teacher: Teacher, states: States, tmp_path: Path) -> None:
    assert errors(teacher, states, tmp_path / "errors")(WHOLE) < 1e-8


def test_scores_are_errors_of_single_choices(
    teacher: Teacher, states: States, tmp_path: Path
) -> None:
    error = errors(teacher, states, tmp_path / "errors")
    scores = measure_scores(error, teacher.sites, ignore)
    site = next(site for site in teacher.sites if site.kind == "transformer_block")
    drop = SearchedStructure(choices={site.name: "drop"})
    assert scores.error(site.name, "drop") == error(drop) > 0
    assert scores.error(site.name, "keep") == 0
    both = [s for s in teacher.sites if s.kind == "resnet"][:2]
    halves = SearchedStructure(choices={s.name: "half" for s in both})
    assert scores.total(halves) == sum(scores.error(s.name, "half") for s in both)
    assert error(WHOLE) < 1e-8, "the teacher is as before"
    assert error.parameters(drop) < error.parameters(WHOLE)


def test_errors_are_measured_once(
    teacher: Teacher, states: States, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "errors"
    site = teacher.sites[0]
    structure = SearchedStructure(choices={site.name: site.choices[1]})
    measured = errors(teacher, states, path)(structure)
    with path.open("a") as file:
        file.write('{"structure": "incompl')  # a process was killed here
    again = errors(teacher, states, path)
    monkeypatch.setattr(States, "error", None)
    assert again(structure) == measured


def test_no_prompts_are_refused(tiny_engines: Path) -> None:
    with pytest.raises(SettingsError, match="no prompts"):
        record_states(tiny_engines, [], {}, ignore)


def test_families_without_a_space_are_refused(tiny: Any) -> None:
    with pytest.raises(CheckpointError, match="without a UNet2DConditionModel to search in"):
        Teacher.open(str(tiny("decidiffusion-1")))


def test_checks_have_both_measures() -> None:
    check = ModelCheck.of([(1.0, 2.0), (2.0, 4.0), (3.0, 3.0)], "good")
    assert check.mean_error == pytest.approx(1 / 3) and check.spearman == 0.5
