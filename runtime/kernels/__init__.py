"""Kernels for CPUs: convolution, normalization, products and attention, as ONNX Runtime operators.

* Compiled: compiler.py builds the C++ sources beside this file into one library. hatch_build.py
  runs it when the package is installed; ``python -m latentforge.runtime.kernels`` runs it later.
* Loaded: runtime/backends/onnxruntime.py passes the library's path to ONNX Runtime, for components
  with ``custom_ops`` in the manifest. Nothing else loads it.
* Used: the passes in optimize/passes/native put the operators into graphs, if library() exists.

Without a C++ compiler the package works without them. docs/kernels.md describes the operators.
"""

from pathlib import Path

from latentforge.runtime.errors import BackendError
from latentforge.runtime.kernels.compiler import LIBRARY

__all__ = ["DOMAIN", "library", "required_library"]

DOMAIN = "latentforge"
"""Domain of the operators in graphs."""


def library() -> Path | None:
    """Return the path of the library, or None if it was not compiled."""
    return LIBRARY if LIBRARY.is_file() else None


def required_library(component: str) -> Path:
    """Return the path of the library for the component of this name; BackendError without it."""
    if path := library():
        return path
    raise BackendError(
        f"{component} needs latentforge's own operators, which are not compiled here: install "
        "a C++ compiler and run python -m latentforge.runtime.kernels, or build the engines "
        "again without the operators (which is the default where they are not compiled)"
    )
