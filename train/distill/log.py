"""Log of a training: a line of JSON for every update, and TensorBoard's files on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentforge.runtime.errors import BackendError

__all__ = ["LossLog"]


class LossLog:
    """Losses of a training.

    Attributes:
        first: means of the values over the first updates.
        last: moving means.
    """

    def __init__(self, file: Path | None, folder: Path | None = None) -> None:
        """Open the log.

        Args:
            file: of lines of JSON, appended to; None in all processes but the first.
            folder: of TensorBoard's files, likewise.

        Raises:
            BackendError: TensorBoard is not installed.
        """
        self._file, self._writer = file, None if folder is None else _writer(folder)
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._count = 0

    def rewind(self, update: int) -> None:
        """Leave out the lines of updates after a state that the training goes on from."""
        if self._file is None:
            return
        with suppress(FileNotFoundError):
            lines = self._file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _update(line) <= update]
            self._file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, update: int, values: Mapping[str, float]) -> None:
        """Add the values of an update."""
        self._count += 1
        for name, value in values.items():
            self.first.setdefault(name, value)
            if self._count <= _FIRST:
                self.first[name] += (value - self.first[name]) / self._count
            last = self.last.get(name, value)
            self.last[name] = last + (value - last) / min(self._count, _WINDOW)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"update": update, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, update)

    def images(self, update: int, images: Any) -> None:
        """Add sample images (count, h, w, 3), 8-bit, to TensorBoard's files."""
        if self._writer is not None:
            self._writer.add_images("samples", images, update, dataformats="NHWC")
            self._writer.flush()

    def state(self) -> dict[str, Any]:
        """Return the means as JSON values."""
        return {"first": self.first, "last": self.last, "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with means that state() returned."""
        self.first, self.last = dict(state["first"]), dict(state["last"])
        self._count = int(state["count"])

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


_FIRST = 10  # updates
_WINDOW = 50  # updates of a moving mean


def _update(line: str) -> float:
    """Return the update of a line; one that was not written completely has none."""
    with suppress(ValueError, KeyError, TypeError):
        return float(json.loads(line)["update"])
    return float("inf")


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BackendError(
            "TensorBoard is not installed: pip install 'latentforge[cpu,train]', or leave out --log"
        ) from error
    return SummaryWriter(str(folder))
