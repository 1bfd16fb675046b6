"""Checkpoints of trained students."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from torch import nn

from latentforge.export.checkpoint import Checkpoint
from latentforge.runtime.files import link_files, staged_directory
from latentforge.train.distill.records import DistillRecord
from latentforge.train.student.writer import (
    DISTILL_RECORD,
    PAGE,
    RECORD,
    TRAINED,
    unchanged_files,
    write_json,
    write_weights,
)

__all__ = ["write_trained"]


def write_trained(
    student: Checkpoint,
    unet: nn.Module,
    target: Path,
    record: DistillRecord,
    changed: Mapping[str, Mapping[str, Any]],
    *,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint: the student's, with trained weights in their precision.

    Files that do not differ are hard links where the file system has them.

    Args:
        student: checkpoint before the training.
        unet: with the names of its weights.
        target: directory to write, completely or not at all.
        record: provenance.
        changed: JSON files that differ from the student's, by path.
        overwrite: replace a trained student that is there.

    Raises:
        TargetError: the directory cannot be written; it exists, or is no trained student.
    """
    files = [*unchanged_files(student), "model_index.json", "unet/config.json"]
    files += [name for name in (RECORD, PAGE) if (student.path / name).is_file()]
    with staged_directory(target, overwrite=overwrite, kind=TRAINED) as partial:
        link_files([name for name in files if name not in changed], student.path, partial)
        for name, content in changed.items():
            write_json(partial / name, content)
        write_json(partial / DISTILL_RECORD, msgspec.to_builtins(record))
        write_weights(unet, student, partial / "unet")
