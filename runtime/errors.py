"""What can go wrong, and whose fault it is.

* LatentforgeError
  - CheckpointError    the checkpoint is missing, damaged, or of a kind we refuse
  - ManifestError      the engine directory is not what its manifest says
  - BackendError       the backend is missing, or refuses the engine
    + DeviceError      the device it needs is not here
      * ForeignEngineError   it was built for another device or version: build it here
  - SettingsError      a request no engine could fulfil: unknown sampler, steps below 1, ...
    + ShapeError       the request does not fit the shapes this engine takes
  - ResultsError       a file of measurements is damaged, or of another version
  - TargetError        the output cannot be written where it was asked for
  - GateError          the work was done, and what came out is not good enough

A message says what is wrong, what was expected, and what to do next, in one line.
"""

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
]


class LatentforgeError(Exception):
    """Base of every error this package raises on purpose."""


class CheckpointError(LatentforgeError):
    """The checkpoint is missing, damaged, or of a kind we refuse."""


class ManifestError(LatentforgeError):
    """The engine directory is not what its manifest says."""


class BackendError(LatentforgeError):
    """The backend is missing, or refuses the engine."""


class DeviceError(BackendError):
    """The device that an engine needs is not here."""


class ForeignEngineError(DeviceError):
    """The engine was built for another device, or by another version of a library."""


class SettingsError(LatentforgeError):
    """A request no engine could fulfil."""


class ShapeError(SettingsError):
    """The request does not fit the shapes this engine takes."""


class ResultsError(LatentforgeError):
    """A file of measurements is damaged, or of another version."""


class TargetError(LatentforgeError):
    """The output cannot be written where it was asked for."""


class GateError(LatentforgeError):
    """The work was done, and what came out is not good enough."""
