"""Convolutions and group norms with channels last, as custom operators of ONNX Runtime.

The sources beside this file are compiled when the package is installed where there is a C++
compiler, and without one the package does without: ``library()`` then is None, and no graph with
these operators is made. Nothing here loads the library but ONNX Runtime itself.
"""

from pathlib import Path

from latentforge.runtime.errors import BackendError
from latentforge.runtime.kernels.compiler import LIBRARY

__all__ = ["DOMAIN", "library", "needed_library"]

DOMAIN = "latentforge"
"""That of the operators, in graphs."""


def library() -> Path | None:
    """Where the library is, or None if it was not built."""
    return LIBRARY if LIBRARY.is_file() else None


def needed_library(user: str) -> Path:
    """Where the library is, for a graph that needs it.

    Raises:
        BackendError: it was not built.
    """
    found = library()
    if found is None:
        raise BackendError(
            f"{user} needs latentforge's own operators, which were not compiled here: install a "
            "C++ compiler and run python -m latentforge.runtime.kernels, or build the engines anew "
            "without them (they are left out where the library is not there)"
        )
    return found
