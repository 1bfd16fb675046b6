"""Training of a tiny student in one process of several: python training_process.py FOLDER ROWS."""

import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from tiny import TINY

from latentforge.export.families.parts import UNet
from latentforge.export.models.searched_structure import SearchedStructure
from latentforge.train.distill.batch import TrainingBatch
from latentforge.train.distill.imitation import Imitation
from latentforge.train.distill.losses import TERMS
from latentforge.train.distill.request import DistillRequest
from latentforge.train.distill.trainer import StudentTrainer, TrainingSetup, make_accelerator
from latentforge.train.distill.training_noise import TrainingNoise
from latentforge.train.student.inherit import student_module

__all__ = ["train"]

_ALL = 4  # rows of an update, of all processes together


class SharedSource:
    """Source whose rows the processes share: each draws all, and takes its own."""

    def __init__(self, process: int) -> None:
        self._process, self._updates = process, 0

    def draw(self, rows: int, generator: torch.Generator) -> TrainingBatch:
        """Return the rows of this process; the given generator is its own, and so is not used."""
        common = torch.Generator().manual_seed(self._updates)
        self._updates += 1
        feeds = {
            "sample": torch.randn(_ALL, 4, 16, 16, generator=common),
            "timestep": torch.randint(1000, (_ALL,), generator=common).float(),
            "encoder_hidden_states": torch.randn(_ALL, 24, 32, generator=common),
        }
        own = slice(rows * self._process, rows * (self._process + 1))
        return TrainingBatch(feeds={name: value[own] for name, value in feeds.items()})

    def state(self) -> dict[str, Any]:
        """Return the position."""
        return {"updates": self._updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        self._updates = int(state["updates"])


def train(folder: Path, rows: int) -> None:
    """Train with so many rows in each process; the first writes losses.jsonl."""
    torch.manual_seed(0)
    teacher: Any = UNet2DConditionModel(**TINY["sd"].unet).eval().requires_grad_(False)
    chosen = SearchedStructure(choices={"mid_block.resnets.1": "drop"})
    student = student_module(deepcopy(teacher), chosen, {})
    weights = {"features": 0.0, "attention": 0.0}  # errors relative to those of the batch
    request = DistillRequest(
        updates=3, batch=rows, rate=1e-3, warmup=1, first_phase=0.0, weights=weights
    )
    accelerator = make_accelerator(request)
    networks = UNet(teacher), UNet(student)
    source = SharedSource(accelerator.process_index)
    noise = TrainingNoise.of({"_class_name": "DDIMScheduler"})
    objective = Imitation(source, TERMS, noise, networks)
    setup = TrainingSetup(teacher=networks[0], student=networks[1], objective=objective, owner={})
    StudentTrainer(setup, request, accelerator, folder).run(lambda *_: None, lambda: None)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
