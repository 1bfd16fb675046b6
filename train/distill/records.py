"""Record of a training: ``distill.json`` in the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentforge.runtime.record import Record

__all__ = ["DistillRecord"]


class DistillRecord(Record, frozen=True, kw_only=True):
    """Provenance of a trained student.

    Attributes:
        version: of latentforge.
        teacher: as the user named it.
        teacher_sha256: of its denoiser's weights.
        student: as the user named it, before the training.
        student_sha256: likewise.
        request: what the training depends on: see DistillRequest.content.
        scales: factor of each loss term.
        first: mean of each term over the first updates, unscaled.
        last: over the last ones.
        updates: of the weights.
        skipped: batches that were left out because of NaN.
        trained: parameters that were trained at the end.
        parameters: of the denoiser.
        license: of the data, as told.
        seconds: of training.
        machine: where.
    """

    version: str
    teacher: str
    teacher_sha256: str
    student: str
    student_sha256: str
    request: Mapping[str, Any]
    scales: Mapping[str, float]
    first: Mapping[str, float]
    last: Mapping[str, float]
    updates: int
    skipped: int
    trained: int
    parameters: int
    license: str | None
    seconds: float
    machine: Mapping[str, str]
