"""Work folder of a search: everything that takes long is kept there as soon as it is made.

    engines-KEY/       the teacher, exported
    states-KEY.npz     states of its trajectories
    errors-KEY.jsonl   true errors of structures over the states
    latency-KEY.json   latencies of structures on the deployed engine
    NAME-KEY.txt       a number of things to measure

A key is the hash of what the file depends on, so that searches for other goals share them, and one
that was interrupted goes on. Nothing is taken that belongs to another checkpoint or request.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.onnx import Dimensions
from latentforge.export.stage import ExportRequest, export
from latentforge.runtime.disk import naming_full_disk
from latentforge.runtime.errors import LatentforgeError, TargetError
from latentforge.runtime.files import staged_file
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.version import __version__
from latentforge.train.search.request import StructureRequest
from latentforge.train.search.states import States, record_states

__all__ = ["SearchWork", "work_folder"]


@contextmanager
def work_folder(target: Path, request: StructureRequest) -> Iterator[Path]:
    """Make the folder of a search, and delete it afterwards unless the request names it.

    It stays after an error or an interrupt, for the next try.

    Raises:
        TargetError: it cannot be made or written, or is inside the student.
    """
    folder = request.work or target.with_name(f".{target.name}.search")
    if target.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise TargetError(f"{folder} is inside the student {target}: name another work folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"cannot write {folder}: {error.strerror}") from error
    with naming_full_disk(folder):
        yield folder
    if request.work is None:
        shutil.rmtree(folder, ignore_errors=True)


class SearchWork:
    """Files of a search for one checkpoint.

    Attributes:
        folder: that they are in.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, request: StructureRequest) -> None:
        self.folder = folder
        self._checkpoint, self._request = checkpoint, request
        self._teacher = [__version__, checkpoint.sha256("unet"), request.size]

    @property
    def engines_path(self) -> Path:
        """Path of the teacher's exported engines."""
        return self.folder / f"engines-{_key(self._teacher)}"

    def engines(self) -> Path:
        """Return the teacher's exported engines, after exporting them if they are not there."""
        path = self.engines_path
        with suppress(LatentforgeError):
            Manifest.read(path)
            return path
        size = self._request.size
        fixed = Dimensions() if size is None else Dimensions(height=size, width=size)
        options = ExportRequest(dimensions=fixed, overwrite=path.exists())
        export(self._checkpoint.name, path, options)
        return path

    def states(
        self,
        engines: Path,
        prompts: tuple[str, ...],
        settings: Mapping[str, Any],
        report: Callable[[int, int], None],
        go_on: Callable[[], bool],
    ) -> States:
        """Return the states of the teacher's trajectories, after recording them if needed."""
        path = self._path("states", "npz", [prompts, settings])
        with suppress(OSError, ValueError):
            return States.read(path)
        states = record_states(engines, prompts, settings, report, go_on)
        with staged_file(path) as partial:
            states.write(partial)
        return states

    def decided(self, name: str, decide: Callable[[], int]) -> int:
        """Return a number that was decided by the time that things take, the same in each try."""
        content = [self._request.target, self._request.recipe, self._request.budget]
        path = self._path(name, "txt", content)
        with suppress(OSError, ValueError):
            return int(path.read_text(encoding="utf-8"))
        number = decide()
        with staged_file(path) as partial:
            partial.write_text(str(number), encoding="utf-8")
        return number

    def errors(self, states: States) -> Path:
        """Return the path of the errors over these states."""
        return self._path("errors", "jsonl", [states.digest])

    def latencies(self) -> Path:
        """Return the path of the table of latencies."""
        return self._path("latency", "json", [self._request.target, self._request.recipe])

    def _path(self, kind: str, suffix: str, content: list[Any]) -> Path:
        return self.folder / f"{kind}-{_key([*self._teacher, *content])}.{suffix}"


def _key(content: list[Any]) -> str:
    encoded = msgspec.json.encode(content, order="deterministic")
    return hashlib.sha256(encoded).hexdigest()[:12]
