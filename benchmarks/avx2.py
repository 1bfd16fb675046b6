"""Make copies of ONNX Runtime and OpenVINO that treat every processor as one without AVX-512.

    python benchmarks/avx2.py FOLDER
    export PYTHONPATH=$PWD/FOLDER LATENTFORGE_KERNELS=avx2
    export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
    latentforge bench ...

oneDNN, torch and our kernels have a setting for AVX2. MLAS, which computes everything in ONNX
Runtime and the fully connected layers in OpenVINO, has none: it reads from the processor which
registers the system saves (XGETBV), and uses all of them. In the copies, the result of XGETBV is
cut to the registers of AVX. Copied are the packages of this environment and of those that peers.py
makes.
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

_XGETBV = re.compile(
    rb"(\x0f\x01\xd0(?:\x48\xc1\xe2\x20)?)\x89\xc0"
)  # xgetbv; [shl rdx, 32]; mov eax, eax
_AND_31 = b"\x24\x1f"  # and al, 31: x87, SSE, AVX and MPX
_LIBRARIES = {
    "onnxruntime": "capi/onnxruntime_pybind11_state*.so",
    "openvino": "libs/libopenvino_intel_cpu_plugin.so",
}


def without_avx512(code: bytes) -> tuple[bytes, int]:
    """Return a library's code with all results of XGETBV cut, and the number of places.

    XGETBV returns its result in EDX and EAX. Compilers combine the halves by ``mov eax, eax``,
    which
    has no effect on a register whose upper half is zero already, and is as long as ``and al, 31``.
    """
    return _XGETBV.subn(lambda match: match[1] + _AND_31, code)


def copy(package: Path, folder: Path) -> int:
    """Copy an installed package into a folder, with the results of XGETBV cut in its library.

    Returns:
        The number of places.

    Raises:
        SystemExit: there is no such place; nothing is copied.
    """
    (library,) = package.glob(_LIBRARIES[package.name])
    code, count = without_avx512(library.read_bytes())
    if not count:
        raise SystemExit(f"{library} has no XGETBV in the expected form: nothing was copied")
    target = folder / package.name
    shutil.copytree(package, target, dirs_exist_ok=True)
    (target / library.relative_to(package)).write_bytes(code)
    return count


def _installed(python: Path | str, name: str) -> Path:
    program = f"import {name}; print({name}.__path__[0])"
    result = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    return Path(result.stdout.strip())


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the copies and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to write, for PYTHONPATH")
    folder = parser.parse_args(arguments).folder
    pythons = {
        "onnxruntime": sys.executable,
        "openvino": environment(ENVIRONMENTS["optimum-openvino"]),
    }
    for name, python in pythons.items():
        count = copy(_installed(python, name), folder)
        print(f"{folder / name}: {count} results of XGETBV cut")


if __name__ == "__main__":
    main()
