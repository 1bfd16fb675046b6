"""A training from end to end, on a tiny checkpoint, and checkpoints that do not belong together."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", exc_type=ImportError)

from latentforge.command_line import run
from latentforge.export.checkpoint import open_checkpoint
from latentforge.export.families import family_of
from latentforge.export.families.parts import load_unet
from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.runtime.errors import CheckpointError, SettingsError, TargetError
from latentforge.runtime.files import check_target
from latentforge.train.distill.batch import SampleSettings
from latentforge.train.distill.pair import Pair
from latentforge.train.distill.request import DistillRequest
from latentforge.train.distill.samples import draw_samples
from latentforge.train.distill.stage import distill
from latentforge.train.distill.training_work import TrainingWork
from latentforge.train.student.inherit import student_module
from latentforge.train.student.writer import RECORD, STUDENT, TRAINED, write_student

STRUCTURE = SearchedStructure(choices={"mid_block.resnets.1": "drop"})
SETTINGS = {"steps": 2, "sampler": "ddim"}


@pytest.fixture(scope="module")
def student(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = open_checkpoint(str(tiny_checkpoint))
    network: Any = load_unet(teacher)
    path = tmp_path_factory.mktemp("students") / "student"
    write_student(teacher, student_module(network, STRUCTURE, {}), path, {"made": "by hand"})
    return path


@pytest.fixture(scope="module")
def work(
    tiny_checkpoint: Path, tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A work folder with the exported teacher."""
    folder = tmp_path_factory.mktemp("work")
    files = TrainingWork(folder, open_checkpoint(str(tiny_checkpoint)), request())
    shutil.copytree(tiny_engines, files.engines_path)
    return folder


def request(**given: Any) -> DistillRequest:
    fields = {"updates": 3, "batch": 4, "runs": 2, "prompts": ("a red apple",), **given}
    return DistillRequest(**{"settings": SETTINGS, **fields})


def test_a_student_is_trained_and_written(
    tiny_checkpoint: Path, student: Path, work: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    folder = Path(shutil.copytree(work, tmp_path / "work"))
    wanted = request(
        work=folder, decay=0.0, rate=1e-2, sample_every=2, log=tmp_path / "log", license="mine"
    )
    record = distill(str(tiny_checkpoint), str(student), tmp_path / "out", wanted)
    assert record.updates == 3 and set(record.scales) == {"prediction", "features", "attention"}
    written = json.loads((tmp_path / "out" / "distill.json").read_text(encoding="utf-8"))
    assert written["teacher_sha256"] == open_checkpoint(str(tiny_checkpoint)).sha256("unet")
    assert written["student_sha256"] == open_checkpoint(str(student)).sha256("unet")
    assert written["license"] == "mine" and written["request"]["updates"] == 3
    assert (tmp_path / "out" / "search.json").read_bytes() == (student / "search.json").read_bytes()
    before, after = (load_unet(open_checkpoint(str(p))) for p in (student, tmp_path / "out"))
    old, new = before.state_dict(), after.state_dict()
    assert list(old) == list(new)
    assert not torch.equal(
        old["mid_block.resnets.0.conv1.weight"], new["mid_block.resnets.0.conv1.weight"]
    )
    assert torch.equal(old["conv_in.weight"], new["conv_in.weight"])
    family_of(open_checkpoint(str(tmp_path / "out"))).plan(open_checkpoint(str(tmp_path / "out")))
    (events,) = (tmp_path / "log").iterdir()
    content = events.read_bytes()
    assert b"prediction" in content and b"samples" in content
    with pytest.raises(TargetError, match="exists"):
        distill(str(tiny_checkpoint), str(student), tmp_path / "out", wanted)
    with pytest.raises(TargetError, match="not a student of latentforge distill"):
        distill(str(tiny_checkpoint), str(student), student, replace(wanted, overwrite=True))
    (tmp_path / "out" / RECORD).touch()  # of the search that its student came from
    with pytest.raises(TargetError, match="not an untrained student of latentforge search"):
        check_target(tmp_path / "out", overwrite=True, kind=STUDENT)
    check_target(tmp_path / "out", overwrite=True, kind=TRAINED)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of three pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"shade {number}")
    return folder


def test_pictures_are_learned_from(
    tiny_checkpoint: Path, student: Path, work: Path, pictures: Path, tmp_path: Path
) -> None:
    wanted = request(work=work / "pictures", data=str(pictures), prompts=(), rate=1e-2, decay=0.0)
    engines = TrainingWork(work / "pictures", open_checkpoint(str(tiny_checkpoint)), wanted)
    shutil.copytree(next(work.glob("engines-*")), engines.engines_path)
    record = distill(str(tiny_checkpoint), str(student), tmp_path / "out", wanted)
    assert set(record.scales) == {"prediction", "features", "attention", "task"}
    assert record.first["task"] > 0 and not list((work / "pictures").glob("states-*"))
    (state,) = (work / "pictures").glob("state-*")
    content = json.loads((state / "state.json").read_text(encoding="utf-8"))["content"]
    assert content["source"] == {"position": 4 * (1 + 8 + 3), "pictures": 3}
    (pictures / "2.txt").unlink()
    with pytest.raises(SettingsError, match=r"1 of 3 pictures .* 2\.png"):
        distill(str(tiny_checkpoint), str(student), tmp_path / "more", wanted)


@pytest.mark.parametrize("scales", [(), (2.0, 8.0)])
def test_a_checkpoint_learns_to_draw_in_few_steps(
    scales: tuple[float, ...], tiny_checkpoint: Path, work: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(work, tmp_path / "work"))
    wanted = request(
        **{"work": folder, "to_steps": 2, "scales": scales, "rate": 1e-2, "decay": 0.0},
        settings={**SETTINGS, "guidance_scale": 3.0},
        **({"sample_every": 3, "log": tmp_path / "log"} if scales else {}),
    )
    record = distill(str(tiny_checkpoint), str(tiny_checkpoint), tmp_path / "out", wanted)
    assert set(record.scales) == {"consistency"}
    out = open_checkpoint(str(tmp_path / "out"))
    plan = family_of(out).plan(out)
    assert out.index["scheduler"] == ["diffusers", "LCMScheduler"]
    defaults = out.sidecar["defaults"]
    assert (defaults["sampler"], defaults["steps"]) == ("lcm", 2)
    assert defaults["guidance_scale"] == (5.0 if scales else 1.0)
    denoiser = next(part for part in plan.components if part.name == "denoiser")
    assert ("timestep_cond" in denoiser.inputs) == bool(scales)
    network: Any = load_unet(out)
    before: Any = load_unet(open_checkpoint(str(tiny_checkpoint)))
    assert not torch.equal(network.conv_in.weight, before.conv_in.weight)
    if scales:
        assert network.time_embedding.cond_proj.weight.abs().max() > 0


def test_guidance_alone_is_folded_in(tiny_checkpoint: Path, work: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(work, tmp_path / "work"))
    settings = {**SETTINGS, "guidance_scale": 3.0}
    wanted = request(work=folder, fold_guidance=True, settings=settings)
    distill(str(tiny_checkpoint), str(tiny_checkpoint), tmp_path / "out", wanted)
    out = open_checkpoint(str(tmp_path / "out"))
    assert out.sidecar["defaults"]["guidance_scale"] == 1.0
    assert out.index == open_checkpoint(str(tiny_checkpoint)).index


def test_samples_are_the_students(tiny_checkpoint: Path, student: Path, tiny_engines: Path) -> None:
    pair, prompts = Pair.open(str(tiny_checkpoint), str(student)), ["a tree", "a cat"]
    images = [
        draw_samples(tiny_engines, network, pair.inputs, prompts, SETTINGS, SampleSettings())
        for network in (pair.teacher_network, pair.student_network)
    ]
    assert images[0].shape == images[1].shape == (2, 32, 32, 3)
    assert (images[0] != images[1]).any() and images[0].std() > 1


def test_what_does_not_belong_together_is_refused(
    tiny: Callable[[str], Path], tiny_checkpoint: Path, student: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no student of"):
        Pair.open(str(tiny("sd-2")), str(student))
    other = Path(shutil.copytree(student, tmp_path / "other"))
    scheduler = other / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text(encoding="utf-8"))
    scheduler.unlink()
    scheduler.write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    with pytest.raises(CheckpointError, match="prediction_type is 'epsilon' and 'v_prediction'"):
        Pair.open(str(tiny_checkpoint), str(other))


def test_text_encoders_are_compared(tiny_checkpoint: Path, student: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(student, tmp_path / "other"))
    path = other / "text_encoder" / "model.safetensors"
    weights = {name: 2 * value for name, value in load_file(path).items()}
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="text_encoder differ"):
        Pair.open(str(tiny_checkpoint), str(other))


def test_prompts_are_needed(tiny_checkpoint: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no prompts to train on"):
        distill(str(tiny_checkpoint), str(student), tmp_path / "out", request(prompts=()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give updates or minutes"),
        (["--updates", "0"], "updates"),
        (["--updates", "2", "--weights", "feature=1"], "no loss term 'feature'"),
        (["--updates", "2", "--weights", "features=x"], "takes a number"),
        (["--updates", "2", "--min-snr", "x"], "--min-snr takes a number"),
        (["--updates", "2", "--prompts", "missing.txt"], "cannot read prompts"),
    ],
)
def test_command_refuses_in_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "out")
    assert run(["distill", "nowhere", "nothing", target, *options]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and words in errors
