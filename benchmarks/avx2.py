"""Copies of ONNX Runtime and OpenVINO that take any processor for one without AVX-512.

    python benchmarks/avx2.py FOLDER
    export PYTHONPATH=$PWD/FOLDER LATENTFORGE_KERNELS=avx2
    export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
    latentforge bench ...

oneDNN, torch and our kernels can be told to do with AVX2. MLAS can't, by which ONNX Runtime
computes everything and OpenVINO its fully connected layers: it asks the processor which registers
the system saves (XGETBV), and takes what it finds. In the copies that answer ends with those of
AVX. What is copied are the packages of this environment and of those that peers.py makes.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from peers import ENVIRONMENTS, environment

__all__ = ["copy", "main", "without_avx512"]

_ASKED = re.compile(
    rb"(\x0f\x01\xd0(?:\x48\xc1\xe2\x20)?)\x89\xc0"
)  # xgetbv; [shl rdx, 32]; mov eax, eax
_CUT = b"\x24\x1f"  # and al, 31: x87, SSE, AVX and MPX
_LIBRARIES = {
    "onnxruntime": "capi/onnxruntime_pybind11_state*.so",
    "openvino": "libs/libopenvino_intel_cpu_plugin.so",
}


def without_avx512(code: bytes) -> tuple[bytes, int]:
    """A library's bytes with each answer of XGETBV cut, and how many there were.

    XGETBV has its answer in EDX and EAX; compilers put the halves together by ``mov eax, eax``,
    which does nothing to a register whose upper half is zero already, and is as long as the cut.
    """
    return _ASKED.subn(lambda found: found[1] + _CUT, code)


def copy(package: Path, folder: Path) -> int:
    """Copy an installed package into a folder and cut what its library is told.

    Returns:
        In how many places.

    Raises:
        SystemExit: in none, and then nothing was copied.
    """
    (library,) = package.glob(_LIBRARIES[package.name])
    code, count = without_avx512(library.read_bytes())
    if not count:
        raise SystemExit(f"{library} asks in a way that is not known here: nothing was copied")
    made = folder / package.name
    shutil.copytree(package, made, dirs_exist_ok=True)
    (made / library.relative_to(package)).write_bytes(code)
    return count


def _installed(python: Path | str, name: str) -> Path:
    program = f"import {name}; print({name}.__path__[0])"
    told = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    return Path(told.stdout.strip())


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the copies and say where."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for PYTHONPATH")
    folder = parser.parse_args(arguments).folder
    pythons = {
        "onnxruntime": sys.executable,
        "openvino": environment(ENVIRONMENTS["optimum-openvino"]),
    }
    for name, python in pythons.items():
        count = copy(_installed(python, name), folder)
        print(f"{folder / name}: {count} answers cut")


if __name__ == "__main__":
    main()
