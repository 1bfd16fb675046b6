"""Work folders of searches and trainings: what takes long to make of a teacher is kept in them.

    engines-KEY/       the teacher, exported
    states-KEY.npz     states of its trajectories

A key is the hash of what the file depends on, so that searches and trainings of one teacher share
them, and one that was interrupted goes on. Nothing is taken that belongs to another checkpoint.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.onnx import Dimensions
from latentforge.export.stage import ExportRequest, export
from latentforge.runtime.disk import naming_full_disk
from latentforge.runtime.errors import LatentforgeError, TargetError, WorkInterrupt
from latentforge.runtime.files import locked_directory, staged_file
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.version import __version__
from latentforge.train.search.states import States, record_states

__all__ = ["TeacherWork", "work_folder"]


@contextmanager
def work_folder(
    target: Path, work: Path | None, kind: str, *, locks: bool = True
) -> Iterator[Path]:
    """Make the folder of a search or training, and delete it afterwards unless it was given.

    It stays after an error or an interrupt, for the next try. Nobody else can use it meanwhile:
    states and losses of two runs would be mixed.

    Args:
        target: of the result.
        work: the folder; None: a hidden sibling of the target.
        kind: ending of the sibling's name.
        locks: keep others out; False in processes that work beside the one that does.

    Raises:
        TargetError: it cannot be made or written, is inside the target, or is in use.
        WorkInterrupt: the block was interrupted.
    """
    folder = work or target.with_name(f".{target.name}.{kind}")
    if target.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise TargetError(f"{folder} is inside the student {target}: name another work folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"cannot write {folder}: {error.strerror}") from error
    with locked_directory(folder) if locks else nullcontext():
        yield from _used(folder, delete=work is None)


def _used(folder: Path, *, delete: bool) -> Iterator[Path]:
    """Yield a work folder, name it in interrupts, and delete it at the end if wanted."""
    try:
        with naming_full_disk(folder):
            yield folder
    except KeyboardInterrupt as interrupt:
        if not any(folder.iterdir()):
            raise
        raise WorkInterrupt(folder, interrupt) from interrupt
    finally:
        if delete:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
    if delete:
        shutil.rmtree(folder, ignore_errors=True)


class TeacherWork:
    """Files that come from a teacher.

    Attributes:
        folder: that they are in.
    """

    def __init__(self, folder: Path, teacher: Checkpoint, size: int | None) -> None:
        """Bind a folder.

        Args:
            folder: by work_folder().
            teacher: the checkpoint.
            size: side of its images in pixels; None: the checkpoint's own.
        """
        self.folder = folder
        self._teacher, self._size = teacher, size
        self._origin = [__version__, teacher.sha256("unet"), size]

    @property
    def engines_path(self) -> Path:
        """Path of the teacher's exported engines."""
        return self.folder / f"engines-{_key(self._origin)}"

    def engines(self) -> Path:
        """Return the teacher's exported engines, after exporting them if they are not there."""
        path = self.engines_path
        with suppress(LatentforgeError):
            Manifest.read(path)
            return path
        fixed = Dimensions(height=self._size, width=self._size) if self._size else Dimensions()
        export(self._teacher.name, path, ExportRequest(dimensions=fixed, overwrite=path.exists()))
        return path

    def states(
        self,
        engines: Path,
        prompts: Sequence[str],
        settings: Mapping[str, Any],
        report: Callable[[int, int], None],
        go_on: Callable[[], bool] = lambda: True,
    ) -> States:
        """Return the states of the teacher's trajectories, after recording them if needed."""
        path = self.path("states", "npz", [prompts, settings])
        with suppress(OSError, ValueError):
            return States.read(path)
        states = record_states(engines, prompts, settings, report, go_on)
        with staged_file(path) as partial:
            states.write(partial)
        return states

    def path(self, kind: str, suffix: str, content: Sequence[Any]) -> Path:
        """Return the path of a file that depends on the teacher and on JSON values."""
        return self.folder / f"{kind}-{_key([*self._origin, *content])}.{suffix}"


def _key(content: Sequence[Any]) -> str:
    encoded = msgspec.json.encode(content, order="deterministic")
    return hashlib.sha256(encoded).hexdigest()[:12]
