"""Compile the kernels beside this file into one library; needs nothing but a C++ compiler.

The package's build runs this file by its path, before anything of the package can be imported.
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
"""Where the library is, once it was built; loaders take that name on every POSIX system."""

_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_INSTRUCTIONS = {
    "_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "_avx512.cpp": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mfma", "-mf16c"),
    ),
}
"""Flags of files that hold kernels for some instructions, by how their names end: which of them
run is chosen when the library is loaded."""


def compiler() -> list[str] | None:
    """The command of a C++ compiler: what CXX says, or one that is there; None if none is."""
    if words := shlex.split(os.environ.get("CXX", "")):
        return words
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in found if path), None)


def build() -> str | None:
    """Write the library, or leave things as they are; return why that failed, in one line."""
    command = compiler()
    if command is None:
        return "no C++ compiler is there"
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
    """Compile file by file, link, and put the result in its place in one step."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = []
    for source in sorted(FOLDER.glob("*.cpp")):
        special = next((f for end, f in _INSTRUCTIONS.items() if source.name.endswith(end)), ())
        if special and not x86:
            continue
        flags = [*_FLAGS, *special, *([] if x86 else ["-DLATENTFORGE_PORTABLE"])]
        objects.append(str(folder / f"{source.stem}.o"))
        _run([*command, *flags, "-c", str(source), "-o", objects[-1]])
    linked = folder / LIBRARY.name
    _run([*command, "-shared", "-pthread", *objects, "-o", str(linked)])
    linked.replace(LIBRARY)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
