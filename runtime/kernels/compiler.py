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
from pathlib import Path

__all__ = ["LIBRARY", "build", "compiler"]

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "liblatentforge.so"
"""Path of the library once it is compiled; the suffix works on every POSIX system."""

_FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_FAST = ("-O3",)  # at -O2 the code is smaller by a fifth, and attention on AVX2 slower
_SMALL = ("-Os",)  # for all but the kernels, and for portable ones that newer processors pass over
_INSTRUCTIONS = {
    "_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "_avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}
"""Compiler flags of the files for one instruction set, by the end of their names. kernels.cpp
selects the instruction set when the library is loaded."""
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
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = []
    for source in sorted(FOLDER.glob("*.cpp")):
        ends = [end for end in _INSTRUCTIONS if source.name.endswith(end)]
        instructions = _INSTRUCTIONS[ends[0]] if ends else ()
        if instructions and not x86:
            continue
        fast = source.name.startswith("kernels_") and (instructions or not x86)
        flags = [*_FLAGS, *(_FAST if fast else _SMALL), *extra]
        flags += [*instructions, *([] if x86 else ["-DLATENTFORGE_PORTABLE"])]
        objects.append(str(folder / f"{source.stem}.o"))
        _run([*command, *flags, "-c", str(source), "-o", objects[-1]])
    linked = folder / LIBRARY.name
    strip = () if extra or sys.platform != "linux" else ("-s",)
    _run([*command, "-shared", "-pthread", *strip, *extra, *objects, "-o", str(linked)])
    return linked


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
