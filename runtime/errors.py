"""What can go wrong, and whose fault it is.

* LatentforgeError
  - ManifestError      the engine directory is not what its manifest says
  - BackendError       the backend is missing, or refuses the engine
  - ShapeError         the request does not fit the engine's input shapes
"""

__all__ = ["BackendError", "LatentforgeError", "ManifestError", "ShapeError"]


class LatentforgeError(Exception):
    """Base of every error this package raises on purpose."""


class ManifestError(LatentforgeError):
    """The engine directory is not what its manifest says."""


class BackendError(LatentforgeError):
    """The backend is missing, or refuses the engine."""


class ShapeError(LatentforgeError):
    """The request does not fit the engine's input shapes."""
