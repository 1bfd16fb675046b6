"""Thousands of calls of latentforge's operators: computed as defined, or refused by name."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hostile_kernel_calls
import pytest

from latentforge.runtime.kernels import library
from latentforge.runtime.kernels.compiler import INSTRUCTION_SETS, LIBRARY, build

TESTS = Path(__file__).parents[1]
CALLS = 2000


def end_of(path: Path, count: int, **environment: str) -> tuple[int, str, str]:
    """Make the first calls in a process of their own; return its status, and what it printed."""
    script = [sys.executable, "-P", hostile_kernel_calls.__file__, str(path), "0", str(count)]
    folders = [str(TESTS), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment}
    done = subprocess.run(script, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout.strip(), done.stderr[-2000:]


@pytest.mark.skipif(library() is None, reason="the library was not compiled here")
def test_calls_are_computed_or_refused() -> None:
    assert end_of(LIBRARY, 300)[:2] == (0, "")


def runtimes() -> str:
    """Return the libraries that a process preloads for the sanitizers, from GCC's folders."""
    if (gcc := shutil.which("g++")) is None:
        pytest.skip("the sanitizers' libraries are found by g++, which is not installed")
    names = ("libasan.so", "libstdc++.so")  # the second for exceptions, which the first watches
    run = [subprocess.run([gcc, f"-print-file-name={n}"], capture_output=True) for n in names]
    paths = [done.stdout.decode().strip() for done in run]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip("g++ has no sanitizers here")
    return " ".join(paths)


def emulated(path: Path, *flags: str, sanitize: bool = False) -> Path:
    """Compile the library to a path, with AMX and AVX512-BF16 in plain C++."""
    header = Path(__file__).with_name("emulated_instructions.h")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", shlex.join(["g++", "-Wno-psabi", *flags, "-include", str(header)]))
        sources: dict[str, tuple[str, ...]] = {f"kernels_{name}": () for name in INSTRUCTION_SETS}
        patch.setattr("latentforge.runtime.kernels.compiler._INSTRUCTIONS", sources)
        assert build(path, sanitize=sanitize) is None
    return path


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runtimes()  # skips the tests before anything is compiled
    return emulated(tmp_path_factory.mktemp("kernels") / "emulated.so", sanitize=True)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["amx", "avx512_bf16"])
def test_emulated_instructions_compute_the_same(kernels: str, emulated_library: Path) -> None:
    """Tiles, strides and remainders of kernels that this processor may not run, sanitized."""
    assert end_of(
        emulated_library,
        CALLS,
        LATENTFORGE_KERNELS=kernels,
        LD_PRELOAD=runtimes(),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
    )[:2] == (0, "")


@pytest.mark.slow
def test_instructions_that_compute_something_else_are_left_out(tmp_path: Path) -> None:
    """And calls are computed by others; with LATENTFORGE_KERNELS they are refused by name."""
    path = emulated(tmp_path / "wrong.so", "-DEMULATED_WRONG")
    status, wrong, said = end_of(path, 10, LATENTFORGE_KERNELS="")
    assert (status, wrong) == (0, "")
    for name in ("amx", "avx512_bf16"):
        assert f"latentforge: warning: the kernels for {name} give wrong results on this" in said
        _, refused, _ = end_of(path, 1, LATENTFORGE_KERNELS=name)
        assert f"LATENTFORGE_KERNELS is '{name}', whose results on this processor are" in refused


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "sanitized.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "g++")
        assert build(path, sanitize=True) is None
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_sanitizers_report_nothing(kernels: str, request: pytest.FixtureRequest) -> None:
    preload = runtimes()  # skips the test before anything is compiled
    path = request.getfixturevalue("sanitized")
    status, wrong, errors = end_of(
        path,
        CALLS,
        LATENTFORGE_KERNELS=kernels,
        LD_PRELOAD=preload,
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
    )
    if "those that this processor runs" in errors:
        pytest.skip(f"this processor does not run {kernels}")
    assert (status, wrong) == (0, ""), errors
