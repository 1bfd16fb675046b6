"""System calls of commands: no network, and no file written outside the target."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from planted import environment

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
CALLS = "trace=connect,sendto,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,link"
NETWORK = re.compile(r"\b(?:connect|sendto)\(.*AF_(?:INET|INET6|UNIX)")
WRITING = re.compile(
    r"^\d+ +(?:open(?:at)?\(.*O_(?:WRONLY|RDWR|CREAT)|(?:creat|mkdir|rename|link)\w*\()"
)
PATH = re.compile(r'"([^"]+)"')

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


def traced(folder: Path, *arguments: str | Path) -> list[str]:
    """Run a command in a folder under strace, and return its successful calls."""
    (folder / "home").mkdir(exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    log, work = folder / "calls", folder / "work"
    work.mkdir(exist_ok=True)
    variables = environment(PYTHONPATH=SOURCE, HOME=str(folder / "home"), TMPDIR=f"{folder}/tmp")
    command = ["strace", "-f", "-qq", "-s", "4096", "-e", CALLS, "-o", str(log)]
    command += [sys.executable, "-m", "latentforge", *map(str, arguments)]
    ended = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return log.read_text(errors="replace").splitlines()


def check(calls: list[str], folder: Path, *, temporary: bool) -> None:
    """Check that nothing was connected to, and that files were written in their places alone."""
    assert calls
    assert [call for call in calls if NETWORK.search(call)] == []
    places = [str(folder / "work"), os.devnull, "/proc/self", "/dev/shm"]
    places += [str(folder / "tmp")] if temporary else []
    written = [call for call in calls if WRITING.search(call) and " = -1 " not in call]
    paths = [(PATH.findall(call) or [""])[-1] for call in written]
    outside = [p for p in paths if os.path.isabs(p) and not p.startswith(tuple(places))]
    assert written and outside == []
    assert list((folder / "home").iterdir()) == [] and list((folder / "tmp").iterdir()) == []


@pytest.fixture
def engines(tiny_engines: Path) -> Path:
    return tiny_engines


def test_run_writes_its_picture_alone(engines: Path, tmp_path: Path) -> None:
    options = ["--steps", "1", "-o", "image.png"]
    check(traced(tmp_path, "run", engines, "a", *options), tmp_path, temporary=True)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_compile_writes_its_target_alone(engines: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    calls = traced(tmp_path, "compile", engines, "out", "--backend", backend)
    check(calls, tmp_path, temporary=True)


@pytest.mark.slow
def test_bench_writes_its_result_alone(engines: Path, tmp_path: Path) -> None:
    options = ["--steps", "1", "--repeats", "1", "--against", "eager", "--json", "b.json"]
    check(traced(tmp_path, "bench", engines, *options), tmp_path, temporary=True)


@pytest.mark.slow
def test_optimize_writes_its_target_alone(engines: Path, tmp_path: Path) -> None:
    options = ["--recipe", "fp32", "--steps", "1", "--repeats", "1", "--gate", "images=1"]
    calls = traced(tmp_path, "optimize", engines, "out", *options)
    check(calls, tmp_path, temporary=True)
