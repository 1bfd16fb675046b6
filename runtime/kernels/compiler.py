"""Compilation of the kernels beside this file into one library, with a C++ compiler alone.

hatch_build.py runs this file by its path when the package is built, so it imports nothing of the
package. The library is loaded by runtime/backends/onnxruntime.py.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["INSTRUCTION_SETS", "LIBRARY", "build", "compiler", "compilable_instructions"]

_X86 = platform.machine().lower() in ("x86_64", "amd64")

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "liblatentforge.so"
"""Path of the library once it is compiled; the suffix works on every POSIX system."""

_FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_FAST = ("-O3",)  # at -O2 the code is smaller by a fifth, and attention on AVX2 slower
_SMALL = ("-Os",)  # for all but the kernels, and for portable ones that newer processors pass over
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
_INSTRUCTIONS = {
    "kernels_avx2": _AVX2,
    "kernels_avx512": _AVX512,
    "kernels_avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "kernels_amx": (*_AVX512, "-mamx-tile", "-mamx-bf16"),
}
"""Compiler flags of the files for one instruction set of x86, by the file's name. An older compiler
that lacks one leaves it out. kernels.cpp selects the instruction set when the library is loaded."""
INSTRUCTION_SETS = tuple(name.removeprefix("kernels_") for name in _INSTRUCTIONS)
"""Names of the instruction sets of x86 that there are kernels for, beside portable ones."""
_SANITIZERS = (
    *("-O1", "-g", "-fno-omit-frame-pointer", "-DLATENTFORGE_EXACT"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
"""Compiler flags of a library that ends the process where it reads or writes outside of a buffer,
or does what C++ leaves undefined."""


def compiler() -> list[str] | None:
    """Return the command of a C++ compiler: $CXX, or an installed one; None if there is none."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    known = os.pathsep.join(filter(os.path.isabs, folders))  # not the working directory
    paths = (shutil.which(name, path=known) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in paths if path), None)


def build(target: Path = LIBRARY, *, sanitize: bool = False) -> str | None:
    """Compile the library; on failure, change nothing and return the reason on one line.

    Args:
        target: the file to write.
        sanitize: compile for tests, with AddressSanitizer and UndefinedBehaviorSanitizer. Only a
            process that preloads their libraries can load it.
    """
    command = compiler()
    if command is None:
        return "no C++ compiler is installed"
    if not any(FOLDER.glob("*.cpp")):
        return (
            "a wheel with the compiled library has no sources: to compile them here, run "
            "pip install --no-binary latentforge latentforge"
        )
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
            linked = _compile(command, Path(folder), _SANITIZERS if sanitize else ())
            linked.replace(target)
    except OSError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return lines[0] if lines else f"{command[0]} failed with status {error.returncode}"
    return None


def _compile(command: list[str], folder: Path, extra: tuple[str, ...]) -> Path:
    """Compile each file with extra flags, link them, and return the library in the folder."""
    sets, objects = compilable_instructions(command), []
    linked_sets = [f"-DLATENTFORGE_{name.removeprefix('kernels_').upper()}" for name in sets]
    for source in sorted(FOLDER.glob("*.cpp")):
        if source.stem in _INSTRUCTIONS and source.stem not in sets:
            continue
        fast = source.stem in sets or (source.stem.startswith("kernels_") and not _X86)
        flags = [*_FLAGS, *(_FAST if fast else _SMALL), *extra, *sets.get(source.stem, linked_sets)]
        objects.append(str(folder / f"{source.stem}.o"))
        _run([*command, *flags, "-c", str(source), "-o", objects[-1]])
    linked = folder / LIBRARY.name
    strip = () if extra or sys.platform != "linux" else ("-s",)
    _run([*command, "-shared", "-pthread", *strip, *extra, *objects, "-o", str(linked)])
    return linked


def compilable_instructions(command: list[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the files for instruction sets of x86 that a compiler knows, with their flags.

    Args:
        command: of the compiler.

    Returns:
        Nothing on another architecture.
    """
    sets = _INSTRUCTIONS if _X86 else {}
    return {name: flags for name, flags in sets.items() if _knows(command, flags)}


def _knows(command: list[str], flags: tuple[str, ...]) -> bool:
    """Return True if a compiler knows the instructions of some flags."""
    trial = [*command, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(trial, capture_output=True).returncode == 0


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
