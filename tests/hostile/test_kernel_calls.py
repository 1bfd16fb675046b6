"""Thousands of calls of latentforge's operators: computed as defined, or refused by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hostile_kernel_calls
import pytest

from latentforge.runtime.kernels import library
from latentforge.runtime.kernels.compiler import LIBRARY, build

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


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "sanitized.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "g++")
        assert build(path, sanitize=True) is None
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"])
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
