"""Work folder of a training: what takes long is kept there as soon as it is made.

engines-KEY/, states-KEY.npz   of the teacher: see train/teacher_work.py
losses.jsonl                   losses by update
state-UPDATE/                  state to go on from: see state.py
"""

from __future__ import annotations

from pathlib import Path

from latentforge.export.checkpoint import DEMO, Checkpoint
from latentforge.runtime.errors import SettingsError
from latentforge.train.distill.request import DistillRequest
from latentforge.train.teacher_work import TeacherWork

__all__ = ["TrainingWork"]


class TrainingWork(TeacherWork):
    """Files of a training that come from the teacher alone."""

    def __init__(self, folder: Path, teacher: Checkpoint, request: DistillRequest) -> None:
        super().__init__(folder, teacher, request.size)
        self._request = request

    def prompts(self) -> list[str]:
        """Return a prompt for each run: those given, again and again.

        Raises:
            SettingsError: there are none.
        """
        given, count = self._request.prompts, self._request.runs
        if not given and self._teacher.name == DEMO:
            from latentforge.export.demo import prompts

            return prompts(count, seed=self._request.seed)
        if not given:
            raise SettingsError(
                "no prompts to train on: give a file with --prompts, one of those per line that "
                "the student is for"
            )
        return [given[index % len(given)] for index in range(count)]
