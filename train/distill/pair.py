"""Teacher and student that belong together, and their denoisers in torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from latentforge.export.checkpoint import Checkpoint, open_checkpoint
from latentforge.export.families import ComponentPlan, ExportPlan, family_of
from latentforge.export.families.parts import UNet
from latentforge.export.optimum import is_exported
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.files import hash_file

__all__ = ["Pair"]

_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
"""Keys of a scheduler's configuration that say what the network was trained for, with defaults."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Teacher and student.

    Attributes:
        teacher: checkpoint of the teacher.
        student: checkpoint of the student, before the training.
        plans: of their denoisers.
    """

    teacher: Checkpoint
    student: Checkpoint
    plans: tuple[ComponentPlan, ComponentPlan]

    @classmethod
    def open(cls, teacher: str, student: str) -> Pair:
        """Open both checkpoints.

        Raises:
            CheckpointError: one is missing, damaged, or has no UNet; or they do not belong
                together.
        """
        checkpoints = open_checkpoint(teacher), open_checkpoint(student)
        first, second = (_export_plan(checkpoint) for checkpoint in checkpoints)
        _check_alike(checkpoints, first, second)
        plans = _denoiser(first), _denoiser(second)
        _check_inputs(student, *plans)
        return cls(teacher=checkpoints[0], student=checkpoints[1], plans=plans)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the denoisers' inputs."""
        return tuple(self.plans[0].inputs)

    @cached_property
    def teacher_network(self) -> UNet:
        """The teacher's denoiser, loaded when first used."""
        return _load(self.teacher, self.plans[0])

    @cached_property
    def student_network(self) -> UNet:
        """The student's denoiser, likewise."""
        return _load(self.student, self.plans[1])

    @cached_property
    def digests(self) -> dict[str, str]:
        """Hashes of the denoisers' weights."""
        checkpoints = {"teacher": self.teacher, "student": self.student}
        folders = {"teacher": self.plans[0].folder, "student": self.plans[1].folder}
        return {name: each.sha256(folders[name]) for name, each in checkpoints.items()}


def _export_plan(checkpoint: Checkpoint) -> ExportPlan:
    if is_exported(checkpoint):
        raise CheckpointError(
            f"{checkpoint.name} holds graphs, which cannot be trained: name the diffusers "
            "checkpoint that they were exported from"
        )
    return family_of(checkpoint).plan(checkpoint)


def _denoiser(plan: ExportPlan) -> ComponentPlan:
    return next(part for part in plan.components if part.name == "denoiser")


def _load(checkpoint: Checkpoint, plan: ComponentPlan) -> UNet:
    network = plan.load(checkpoint)
    if not isinstance(network, UNet) or not isinstance(network.model, UNet2DConditionModel):
        raise CheckpointError(
            f"the denoiser of {checkpoint.name} is not diffusers' UNet2DConditionModel, nor a "
            "student of one: no other is trained"
        )
    return network


def _check_alike(
    checkpoints: tuple[Checkpoint, Checkpoint], first: ExportPlan, second: ExportPlan
) -> None:
    """Check that text encoders, latent space and noise schedule are the same."""
    teacher, student = checkpoints
    for name in ("latent", "conditioning"):
        if getattr(first, name) != getattr(second, name):
            raise CheckpointError(_foreign(teacher, student, f"their {name} differs"))
    schedules = [_schedule(checkpoint) for checkpoint in checkpoints]
    for key, default in _SCHEDULE.items():
        first_value, second_value = (schedule.get(key, default) for schedule in schedules)
        if first_value != second_value:
            values = f"{key} is {first_value!r} and {second_value!r}"
            raise CheckpointError(_foreign(teacher, student, values))
    folders = {part.folder for part in first.components if part.name != "denoiser"}
    for folder in sorted(folders):
        if not _same_files(teacher.weights(folder)[0], student.weights(folder)[0]):
            raise CheckpointError(_foreign(teacher, student, f"their {folder} differ"))


def _check_inputs(name: str, teacher: ComponentPlan, student: ComponentPlan) -> None:
    for key in {**teacher.inputs, **student.inputs}:
        values = [plan.inputs.get(key) for plan in (teacher, student)]
        if values[0] != values[1]:
            raise CheckpointError(
                f"the denoiser of {name} takes another {key} than its teacher's: train a student "
                "of this teacher"
            )


def _foreign(teacher: Checkpoint, student: Checkpoint, reason: str) -> str:
    return (
        f"{student.name} is no student of {teacher.name}: {reason}; train with the checkpoint "
        "that it was made of"
    )


def _schedule(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return checkpoint.config("scheduler", "scheduler_config.json")


def _same_files(first: list[Path], second: list[Path]) -> bool:
    """Return True for equal content; a student's files are often links to its teacher's."""
    if len(first) != len(second):
        return False
    return all(
        os.path.samefile(a, b) or hash_file(a) == hash_file(b)
        for a, b in zip(first, second, strict=True)
    )
