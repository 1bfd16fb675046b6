"""Compilation of the kernels beside this file into one library, with a C++ compiler alone.

hatch_build.py runs this file by its path when the package is built, so it imports nothing of the
package. The library is loaded by runtime/backends/onnxruntime.py.
"""

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["LIBRARY", "build", "compiler"]

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "liblatentforge.so"
"""Path of the library once it is compiled; the suffix works on every POSIX system."""

_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_INSTRUCTIONS = {
    "_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "_avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}
"""Compiler flags of the files for one instruction set, by the end of their names. kernels.cpp
selects the instruction set when the library is loaded."""


def compiler() -> list[str] | None:
    """Return the command of a C++ compiler: $CXX, or an installed one; None if there is none."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    known = os.pathsep.join(filter(os.path.isabs, folders))  # not the working directory
    paths = (shutil.which(name, path=known) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in paths if path), None)


def build() -> str | None:
    """Compile the library; on failure, change nothing and return the reason on one line."""
    command = compiler()
    if command is None:
        return "no C++ compiler is installed"
    try:
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".build-") as folder:
            _compile(command, Path(folder))
    except OSError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return lines[0] if lines else f"{command[0]} failed with status {error.returncode}"
    return None


def _compile(command: list[str], folder: Path) -> None:
    """Compile each file, link them, and replace the library atomically."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = []
    for source in sorted(FOLDER.glob("*.cpp")):
        ends = [end for end in _INSTRUCTIONS if source.name.endswith(end)]
        instructions = _INSTRUCTIONS[ends[0]] if ends else ()
        if instructions and not x86:
            continue
        flags = [*_FLAGS, *instructions, *([] if x86 else ["-DLATENTFORGE_PORTABLE"])]
        objects.append(str(folder / f"{source.stem}.o"))
        _run([*command, *flags, "-c", str(source), "-o", objects[-1]])
    linked = folder / LIBRARY.name
    _run([*command, "-shared", "-pthread", *objects, "-o", str(linked)])
    linked.replace(LIBRARY)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
