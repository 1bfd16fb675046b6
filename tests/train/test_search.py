"""A search from end to end, on a tiny checkpoint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

from latentforge.command_line import run
from latentforge.export.checkpoint import open_checkpoint
from latentforge.runtime.errors import CheckpointError, SettingsError, TargetError
from latentforge.train.search import stage
from latentforge.train.search.request import StructureRequest
from latentforge.train.search.search_record import SearchRecord
from latentforge.train.search.teacher import Teacher
from latentforge.train.search.work import SearchWork

GOAL = 0.6  # of the teacher's parameters


@pytest.fixture(scope="module")
def work(
    tiny_checkpoint: Path, tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A work folder with the exported teacher, which the tests share."""
    folder = tmp_path_factory.mktemp("work")
    files = SearchWork(folder, open_checkpoint(str(tiny_checkpoint)), request(parameters=1))
    shutil.copytree(tiny_engines, files.engines_path)
    return folder


def request(**given: Any) -> StructureRequest:
    """A request whose budget is over at once, so that as little as possible is measured."""
    settings = {"steps": 2, "sampler": "ddim"}
    return StructureRequest(prompts=("a red apple",), settings=settings, budget=1.0, **given)


def parameters(checkpoint: Path) -> int:
    network = Teacher.open(str(checkpoint)).network
    return sum(weight.numel() for weight in network.model.parameters())


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.thorough
def test_a_search_goes_on_after_interrupts(
    tiny_checkpoint: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = int(GOAL * parameters(tiny_checkpoint))
    wanted, student = request(parameters=goal, work=work), tmp_path / "student"

    def interrupt(place: object, name: str) -> None:
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(place, name, interrupted)
            stage.search(str(tiny_checkpoint), student, wanted)

    interrupt(stage.Selection, "choose")
    assert list(tmp_path.iterdir()) == []
    (errors,) = work.glob("errors-*.jsonl")
    measured = errors.read_text()

    student.mkdir()
    (student / "search.json").write_text("old")  # an untrained student stands there
    wanted = replace(wanted, overwrite=True)
    interrupt(stage, "render_search")
    assert (student / "search.json").read_text() == "old"
    record = stage.search(str(tiny_checkpoint), student, wanted)
    assert errors.read_text().startswith(measured) and measured
    check_student(record, student, goal)
    assert list(tmp_path.iterdir()) == [student]


def check_student(record: SearchRecord, student: Path, goal: int) -> None:
    teacher, chosen = record.points[0], record.chosen
    assert teacher.error < 1e-8 < chosen.error
    assert chosen.parameters <= goal < teacher.parameters
    assert chosen.speedup is not None and chosen.measured is not None
    stored = json.loads((student / "search.json").read_text())
    assert stored["points"][1]["choices"] == dict(chosen.choices)
    config = json.loads((student / "unet" / "config.json").read_text())
    assert config["structure"]["choices"] == dict(chosen.choices)
    page = (student / "search.html").read_text()
    assert "BK-SDM" in page and record.words.splitlines()[0] in page
    with pytest.raises(CheckpointError, match="was searched already"):
        Teacher.open(str(student))


def test_goals_out_of_reach_are_refused(tiny_checkpoint: Path, work: Path, tmp_path: Path) -> None:
    for goal, words in ((10, "nothing reaches parameters 10"), (10**12, "is no goal")):
        with pytest.raises(SettingsError, match=words):
            wanted = request(parameters=goal, work=work)
            stage.search(str(tiny_checkpoint), tmp_path / "student", wanted)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_student_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="exists"):
        stage.search(str(tiny_checkpoint), tmp_path, request(parameters=1))


def test_a_student_alone_is_overwritten(tiny_checkpoint: Path, work: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    wanted = request(parameters=1, work=work, overwrite=True)
    with pytest.raises(TargetError, match="is not an untrained student of latentforge search"):
        stage.search(str(tiny_checkpoint), tmp_path, wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_work_folder_inside_the_student_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    wanted = request(parameters=1, work=tmp_path / "student" / "work")
    with pytest.raises(TargetError, match="is inside the student"):
        stage.search(str(tiny_checkpoint), tmp_path / "student", wanted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "a search has one goal"),
        (["--speedup", "2", "--memory", "1M"], "not speedup and memory"),
        (["--parameters", "many"], "--parameters takes a number such as 400M"),
        (["--speedup", "2", "--budget", "soon"], "a budget is a time"),
        (["--speedup", "2", "--prompts", "missing.txt"], "cannot read prompts from missing.txt"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["search", "demo", "student", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
