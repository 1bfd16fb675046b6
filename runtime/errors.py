"""Exceptions that latentforge raises on purpose.

A message is one line: what is wrong, what was expected, and what to do next.
"""

from pathlib import Path

from latentforge.runtime.text import one_line, printable

__all__ = [
    "BackendError",
    "CheckpointError",
    "DeviceError",
    "ForeignEngineError",
    "GateError",
    "LatentforgeError",
    "ManifestError",
    "ResultsError",
    "SettingsError",
    "ShapeError",
    "TargetError",
    "WorkInterrupt",
]


_MAX_MESSAGE = 1000  # characters


class LatentforgeError(Exception):
    """Base class of all errors that this package raises on purpose.

    Messages quote files and libraries: whatever is in them, they are one line that can be printed.
    """

    def __init__(self, message: object = "") -> None:
        line = printable(one_line(message, limit=None)) if str(message) else ""
        half = _MAX_MESSAGE // 2
        whole = len(line) <= _MAX_MESSAGE
        super().__init__(line if whole else f"{line[: half - 3]} ... {line[-half + 2 :]}")


class CheckpointError(LatentforgeError):
    """Checkpoint that is missing, damaged, or of an unsupported kind."""


class ManifestError(LatentforgeError):
    """Invalid manifest, or an engine directory that does not match it."""


class BackendError(LatentforgeError):
    """Backend that is not installed, or refuses the engine."""


class DeviceError(BackendError):
    """Missing device that an engine needs."""


class ForeignEngineError(DeviceError):
    """Engine that was built for another device, or by another version of a library."""


class SettingsError(LatentforgeError):
    """Invalid request: unknown sampler, steps below 1, ..."""


class ShapeError(SettingsError):
    """Request that does not fit the shapes that the engine supports."""


class ResultsError(LatentforgeError):
    """Results file that is damaged, or of another version."""


class TargetError(LatentforgeError):
    """Output that cannot be written to its target."""


class GateError(LatentforgeError):
    """Result that does not pass the quality gate."""


class WorkInterrupt(KeyboardInterrupt):
    """Interrupt of a command that goes on from a folder of work, which stays.

    Attributes:
        folder: the folder.
    """

    def __init__(self, folder: Path, interrupt: KeyboardInterrupt) -> None:
        """Take the place of another interrupt, which says how the command was interrupted."""
        super().__init__(*interrupt.args)
        self.folder = folder
