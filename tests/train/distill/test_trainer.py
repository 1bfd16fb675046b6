"""Trainings of tiny students: they learn, and go on from where they were stopped, bit by bit."""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import TINY

from latentforge.export.families.parts import UNet
from latentforge.export.models.searched_structure import Importance, Kept, SearchedStructure
from latentforge.runtime.denoising.guidance import Guidance
from latentforge.runtime.errors import SettingsError, TargetError
from latentforge.train.distill.batch import TrainingBatch
from latentforge.train.distill.imitation import Imitation
from latentforge.train.distill.losses import TERMS
from latentforge.train.distill.memory import TrainingMemory, check_memory, predict_memory
from latentforge.train.distill.module_outputs import droppable, dropped
from latentforge.train.distill.request import DistillRequest
from latentforge.train.distill.trainer import StudentTrainer, TrainingSetup, make_accelerator
from latentforge.train.distill.training_noise import TrainingNoise
from latentforge.train.distill.trajectories import TrajectorySource
from latentforge.train.search.states import State, States
from latentforge.train.student.inherit import student_module

SITES = {
    "down_blocks.0.attentions.0.transformer_blocks.0": "no_feed_forward",
    "mid_block.resnets.1": "drop",
}
NOISE = TrainingNoise(squares=torch.linspace(0.99, 0.0, 1000), prediction="v_prediction")
NO_PARTS: Importance = {}
OWNER = {"teacher": "a", "student": "b"}
CALIBRATION = 9  # draws before the first update: for the memory, and for scales


def made_teacher() -> Any:
    """Random UNet, in which what the student lacks has a part in the prediction."""
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**TINY["sd"].unet).eval().requires_grad_(False)
    for path in ("mid_block.resnets.1.conv2", "down_blocks.0.attentions.0.proj_out"):
        unet.get_parameter(f"{path}.weight").mul_(8)
    return unet


def made_student(teacher: Any, choices: Mapping[str, Any] = SITES) -> Any:
    return student_module(deepcopy(teacher), SearchedStructure(choices=choices), NO_PARTS)


def made_states(count: int = 6, images: int = 2) -> States:
    numbers = np.random.default_rng(0)
    states = []
    for index in range(count):
        feeds = {
            "sample": numbers.standard_normal((2 * images, 4, 16, 16), np.float32),
            "timestep": np.array([900.0 - 100 * index], np.float32),
            "encoder_hidden_states": numbers.standard_normal((2 * images, 24, 32), np.float32),
        }
        prediction = np.zeros((images, 4, 16, 16), np.float32)
        states.append(State(feeds=feeds, prediction=prediction, weight=1 / count))
    return States(states=tuple(states), guidance=Guidance(rows=2, scale=3.0))


def trainer(folder: Path, source: Any = None, **fields: Any) -> StudentTrainer:
    folder.mkdir(exist_ok=True)
    options = {"updates": 4, "batch": 4, "rate": 1e-3, "warmup": 1, "guided": 0.5, **fields}
    request = DistillRequest(**options)
    teacher = made_teacher()
    student = UNet(made_student(teacher))
    given = source or TrajectorySource(made_states(), request.guided)
    networks = UNet(teacher), student
    objective = Imitation(given, TERMS, NOISE, networks, request.min_snr)
    accelerator = make_accelerator(request)
    setup = TrainingSetup(teacher=networks[0], student=student, objective=objective, owner=OWNER)
    return StudentTrainer(setup, request, accelerator, folder)


def run(training: StudentTrainer, stop: int | None = None) -> StudentTrainer:
    def report(_: float) -> None:
        if training.progress.update == stop:
            raise KeyboardInterrupt

    training.run(report, lambda: None)
    return training


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "losses.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def error(training: StudentTrainer) -> float:
    """Mean squared error of the student's predictions over fixed batches."""
    source, total = TrajectorySource(made_states(), 0.0), 0.0
    student, teacher = training._student.eval(), UNet(made_teacher())
    for seed in range(4):
        batch = source.draw(8, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            total += (student(**batch.feeds) - teacher(**batch.feeds)).square().mean().item()
    return total


def test_training_halves_the_error_of_the_student(tmp_path: Path) -> None:
    options = {"rate": 3e-4, "warmup": 8, "guided": 0.0, "first_phase": 0.0, "decay": 0.8}
    training = trainer(tmp_path, updates=24, batch=4, **options)
    before = error(training)
    run(training)
    training.finish()
    assert error(training) < 0.5 * before
    first, last = lines(tmp_path)[0], lines(tmp_path)[-1]
    assert {"loss", "prediction", "features", "attention", "rate"} < set(first)
    assert last["features"] < first["features"] and last["update"] == 24


def test_first_losses_are_of_one_scale(tmp_path: Path) -> None:
    training = trainer(tmp_path, weights={"attention": 1.0, "features": 1.0})
    scales, sums = training.progress.scales, dict.fromkeys(training.progress.scales, 0.0)
    for number in range(8):
        batch = training.objective.source.draw(4, training._generator("calibration", number))
        with torch.no_grad():
            for name, value in training._terms(batch).items():
                sums[name] += scales[name] * value.item()
    assert sums["attention"] == pytest.approx(sums["prediction"], rel=1e-4)
    assert sums["features"] == pytest.approx(sums["prediction"], rel=1e-4)


@pytest.mark.parametrize("fields", [{}, {"block_drop": 0.3, "accumulation": 2}, {"lora_rank": 2}])
def test_interrupted_training_goes_on_bit_by_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    run(trainer(tmp_path / "whole", save_every=100, **fields))
    stopped = trainer(tmp_path / "parts", save_every=2, **fields)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, stop=3)
    resumed = trainer(tmp_path / "parts", save_every=2, **fields)
    assert resumed.progress.update == 3
    run(resumed)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_killed_training_repeats_what_was_after_its_last_state(tmp_path: Path) -> None:
    run(trainer(tmp_path / "whole"))
    killed = trainer(tmp_path / "parts", save_every=2)
    for _ in range(2):
        killed._advance(killed._share())
    killed.save()
    killed._advance(killed._share())  # and then SIGKILL: nothing is saved
    run(trainer(tmp_path / "parts"))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_an_interrupt_stays_one_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trainer(tmp_path)

    def full(*_: object) -> None:
        raise TargetError("the disk is full")

    monkeypatch.setattr("latentforge.train.distill.trainer.save_state", full)
    with pytest.raises(KeyboardInterrupt):
        run(training, stop=1)


class Damaged(TrajectorySource):
    """Source that has no batch for some update."""

    def __init__(self) -> None:
        super().__init__(made_states(), 0.5)
        self.left = CALIBRATION + 3

    def draw(self, rows: int, generator: torch.Generator) -> TrainingBatch:
        self.left -= 1
        if self.left == 0:
            raise SettingsError("cannot read 7.png as an image")
        return super().draw(rows, generator)


def test_nothing_is_lost_to_a_damaged_picture(tmp_path: Path) -> None:
    run(trainer(tmp_path / "whole", save_every=100))
    with pytest.raises(SettingsError, match=r"7\.png"):
        run(trainer(tmp_path / "parts", Damaged(), save_every=100))
    resumed = trainer(tmp_path / "parts")
    assert resumed.progress.update == 2
    run(resumed)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_state_of_another_training_is_refused_by_name(tmp_path: Path) -> None:
    run(trainer(tmp_path, updates=1))
    with pytest.raises(SettingsError, match="whose batch is 4 and not 2"):
        trainer(tmp_path, updates=1, batch=2)
    (state,) = tmp_path.glob("state-*")
    weights = state / "tensors.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SettingsError, match="damaged"):
        trainer(tmp_path, updates=1)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    teacher = UNet(made_teacher())
    source = TrajectorySource(made_states(), 0.0)
    objective = Imitation(source, TERMS, NOISE, (teacher, UNet(made_teacher())))
    setup = TrainingSetup(
        teacher=teacher, student=UNet(made_teacher()), objective=objective, owner=OWNER
    )
    request = DistillRequest(updates=1, batch=2)
    with pytest.raises(SettingsError, match="nothing to learn"):
        StudentTrainer(setup, request, make_accelerator(request), tmp_path)


class Poisoned(TrajectorySource):
    """Source whose batches of some updates hold NaN."""

    def __init__(self, draws: range) -> None:
        super().__init__(made_states(), 0.0)
        self.draws, self.count = draws, 0

    def draw(self, rows: int, generator: torch.Generator) -> TrainingBatch:
        batch = super().draw(rows, generator)
        self.count += 1
        if self.count in self.draws:
            batch.feeds["sample"].fill_(float("nan"))
        return batch


def test_batch_with_nan_is_skipped_and_counted(tmp_path: Path) -> None:
    source = Poisoned(range(CALIBRATION + 2, CALIBRATION + 4))
    training = run(trainer(tmp_path, source, updates=5))
    assert training.progress.skipped == 2
    assert [line["update"] for line in lines(tmp_path)] == [1, 4, 5]
    assert all(torch.isfinite(p).all() for p in training._unet.parameters())


def test_three_batches_with_nan_stop(tmp_path: Path) -> None:
    source = Poisoned(range(CALIBRATION + 2, CALIBRATION + 9))
    with pytest.raises(SettingsError, match="3 batches in a row had NaN"):
        run(trainer(tmp_path, source, updates=9))
    assert not list(tmp_path.glob("state-*"))


def test_first_phase_trains_what_is_beside_a_removal(tmp_path: Path) -> None:
    training = trainer(tmp_path, updates=2, first_phase=0.5, rate=1e-2)
    before = {name: p.detach().clone() for name, p in training._unet.named_parameters()}
    changed = iter(changes(training, before))
    first, both = next(changed), next(changed)
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight" in first
    assert "up_blocks.0.resnets.0.conv1.weight" in first
    assert "down_blocks.0.resnets.0.conv1.weight" not in first
    assert "down_blocks.0.resnets.0.norm1.weight" in first
    assert "down_blocks.0.resnets.0.conv1.weight" in both
    assert not [name for name in both if name.startswith(("conv_in", "time_embedding"))]


def changes(training: StudentTrainer, before: Mapping[str, Any]) -> Iterator[set[str]]:
    for _ in range(2):
        training._advance(training._share())
        named = training._unet.named_parameters()
        yield {name for name, p in named if not torch.equal(p, before[name])}


def test_low_rank_leaves_frozen_weights_as_they_are_and_is_merged(tmp_path: Path) -> None:
    training = trainer(tmp_path, updates=3, lora_rank=2, rate=1e-2, decay=0.0)
    names = set(training._unet.state_dict())
    name = "up_blocks.1.resnets.0.conv1.weight"
    before = training._unet.get_parameter(name).detach().clone()
    run(training)
    assert torch.equal(training._unet.get_parameter(name), before)
    batch = TrajectorySource(made_states(), 0.0).draw(4, torch.Generator().manual_seed(0))
    training._unet.eval()
    with torch.no_grad():
        whole = training._student(**batch.feeds)
        training.finish()
        merged = training._student(**batch.feeds)
    assert not torch.equal(training._unet.get_parameter(name), before)
    assert set(training._unet.state_dict()) == {n for n in names if "low_rank" not in n}
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-5)


def test_checkpointed_activations_give_the_same_losses(tmp_path: Path) -> None:
    run(trainer(tmp_path / "whole", updates=2))
    run(trainer(tmp_path / "less", updates=2, checkpointing=True))
    pairs = zip(lines(tmp_path / "less"), lines(tmp_path / "whole"), strict=True)
    for less, whole in pairs:
        assert less == pytest.approx(whole, rel=1e-4)


def test_memory_that_there_is_not_is_refused() -> None:
    huge = TrainingMemory(gradients=1, moments=2, average=3, activations=1 << 60, buffers=4)
    with pytest.raises(SettingsError, match="lower --batch"):
        check_memory(huge, torch.device("cpu"))


def test_memory_falls_with_what_is_saved() -> None:
    source = TrajectorySource(made_states(), 0.0)
    feeds = source.draw(8, torch.Generator().manual_seed(0)).feeds
    model = made_teacher().train().requires_grad_(True)
    network, halves = UNet(model), torch.bfloat16
    whole, half = (predict_memory(network, 10, feeds, d) for d in (torch.float32, halves))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert (whole.gradients, whole.moments, whole.average) == (40, 80, 4 * weights)
    # Norms keep float32.
    assert 0.5 * whole.activations < half.activations < 0.8 * whole.activations
    model.enable_gradient_checkpointing()
    less = predict_memory(network, 10, feeds).activations
    assert 0.1 * whole.activations < less < 0.6 * whole.activations


def test_halved_sites_are_trained_first() -> None:
    from latentforge.train.distill.phases import beside_removals

    choices: Any = {"mid_block.attentions.0.transformer_blocks.0": "half"}
    kept = Kept(self_heads=(0,), cross_heads=(0,), channels=tuple(range(128)))
    teacher = made_teacher()
    parts = {name: kept for name in choices}
    student = student_module(deepcopy(teacher), SearchedStructure(choices=choices), parts)
    assert beside_removals(student) == tuple(choices)
    assert beside_removals(teacher) == ()


def test_blocks_that_a_student_lacks_are_not_left_out() -> None:
    teacher = made_teacher()
    student = made_student(teacher)
    assert set(droppable(teacher)) - set(droppable(student)) == {"mid_block.resnets.1"}
    paths = droppable(student)
    batch = TrajectorySource(made_states(), 0.0).draw(2, torch.Generator().manual_seed(0))
    network = UNet(student)
    with torch.no_grad():
        whole = network(**batch.feeds)
        with dropped(student, paths):
            less = network(**batch.feeds)
        assert torch.equal(network(**batch.feeds), whole)
    assert less.isfinite().all() and not torch.equal(less, whole)
