"""Kernels for CPUs: convolution, normalization, products and attention, as ONNX Runtime operators.

* Compiled: compiler.py builds the C++ sources beside this file into one library. hatch_build.py
  runs it when the package is installed; ``python -m latentforge.runtime.kernels`` runs it later.
* Loaded: runtime/backends/onnxruntime.py passes the library's path to ONNX Runtime, for components
  with ``custom_ops`` in the manifest. instruction_sets() loads it to ask what it has.
* Used: the passes in optimize/passes/native put the operators into graphs, if library() exists.

Without a C++ compiler the package works without them. docs/kernels.md describes the operators.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

from latentforge.runtime.errors import BackendError
from latentforge.runtime.kernels.compiler import LIBRARY

__all__ = ["DOMAIN", "InstructionSets", "instruction_sets", "library", "required_library"]

DOMAIN = "latentforge"
"""Domain of the operators in graphs."""


@dataclass(frozen=True, kw_only=True)
class InstructionSets:
    """Instruction sets of the compiled library, the fastest first.

    Attributes:
        used: by the operators here; empty if LATENTFORGE_KERNELS names none of those supported.
        supported: that this processor runs.
        compiled: that the library has; an older compiler leaves out those that it lacks.
    """

    used: str
    supported: tuple[str, ...]
    compiled: tuple[str, ...]

    @property
    def multiplies_bf16(self) -> bool:
        """True if those used multiply bfloat16 faster than float32."""
        return self.used in ("amx", "avx512_bf16")


def instruction_sets() -> InstructionSets | None:
    """Return the instruction sets of the library, or None if it was not compiled.

    Raises:
        BackendError: the library cannot be loaded, or was compiled from earlier sources.
    """
    if (path := library()) is None:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        used, supported, compiled = (
            _text(loaded[f"latentforge_{name}"]) for name in ("kernels", "supported", "compiled")
        )
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"{path} cannot be used: {error}; run python -m latentforge.runtime.kernels"
        ) from error
    return InstructionSets(
        used=used, supported=tuple(supported.split()), compiled=tuple(compiled.split())
    )


def _text(function: "ctypes._NamedFuncPointer") -> str:
    """Return the text that a function of the library returns, or nothing for null."""
    function.restype = ctypes.c_char_p
    return (function() or b"").decode()


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
