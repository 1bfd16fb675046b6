"""Work folder of a search: everything that takes long is kept there as soon as it is made.

engines-KEY/, states-KEY.npz   of the teacher: see train/teacher_work.py
errors-KEY.jsonl               true errors of structures over the states
latency-KEY.json               latencies of structures on the deployed engine
NAME-KEY.txt                   a number of things to measure
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from latentforge.export.checkpoint import Checkpoint
from latentforge.runtime.files import staged_file
from latentforge.train.search.request import StructureRequest
from latentforge.train.search.states import States
from latentforge.train.teacher_work import TeacherWork

__all__ = ["SearchWork"]


class SearchWork(TeacherWork):
    """Files of a search for one checkpoint."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, request: StructureRequest) -> None:
        super().__init__(folder, checkpoint, request.size)
        self._request = request

    def decided(self, name: str, decide: Callable[[], int]) -> int:
        """Return a number that was decided by the time that things take, the same in each try."""
        content = [self._request.target, self._request.recipe, self._request.budget]
        path = self.path(name, "txt", content)
        with suppress(OSError, ValueError):
            return int(path.read_text(encoding="utf-8"))
        number = decide()
        with staged_file(path) as partial:
            partial.write_text(str(number), encoding="utf-8")
        return number

    def errors(self, states: States) -> Path:
        """Return the path of the errors over these states."""
        return self.path("errors", "jsonl", [states.digest])

    def latencies(self) -> Path:
        """Return the path of the table of latencies."""
        return self.path("latency", "json", [self._request.target, self._request.recipe])
