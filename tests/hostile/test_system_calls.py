"""System calls of commands: no network, and no file written outside the target."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from planted import environment
from tiers import further

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
CALLS = (
    "trace=connect,sendto,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,"
    "symlink,symlinkat,unlink,unlinkat,rmdir,truncate,chmod,fchmodat"
)
NETWORK = re.compile(r"\b(?:connect|sendto)\(.*AF_(?:INET|INET6|UNIX(?!.*/run/nscd/socket))")
"""Calls to others; the C library asks the system's cache of names for that of the user."""

WRITING = re.compile(
    r"^\d+ +(?:open(?:at)?\(.*O_(?:WRONLY|RDWR|CREAT)"
    r"|(?:creat|mkdir|rename|link|symlink|unlink|rmdir|truncate|chmod|fchmod)\w*\()"
)
PATH = re.compile(r'"([^"]+)"')

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


def traced(folder: Path, *arguments: str | Path) -> list[str]:
    """Run a command in a folder under strace, and return its successful calls."""
    (folder / "home").mkdir(exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    cache = str(folder / "cache") if "build" in arguments else "off"
    log, work = folder / "calls", folder / "work"
    work.mkdir(exist_ok=True)
    variables = environment(
        PYTHONPATH=SOURCE, HOME=f"{folder}/home", TMPDIR=f"{folder}/tmp", LATENTFORGE_CACHE=cache
    )
    command = ["strace", "-f", "-qq", "-s", "4096", "-e", CALLS, "-o", str(log)]
    command += [sys.executable, "-m", "latentforge", *map(str, arguments)]
    ended = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return log.read_text(errors="replace").splitlines()


def check(calls: list[str], folder: Path, *, temporary: bool, writes: bool = True) -> None:
    """Check that nothing was connected to, and that files were written in their places alone."""
    assert calls
    assert [call for call in calls if NETWORK.search(call)] == []
    work = str(folder / "work")
    places = [work, str(folder / "cache"), os.devnull, "/proc/self", "/dev/shm"]
    places += [str(folder / "tmp")] if temporary else []
    written = [call for call in calls if WRITING.search(call) and " = -1 " not in call]
    paths = [(PATH.findall(call) or [""])[-1] for call in written]
    whole = [os.path.normpath(os.path.join(work, path)) for path in paths]
    outside = [path for path in whole if not path.startswith(tuple(places))]
    assert outside == [] and (written or not writes)
    assert list((folder / "home").iterdir()) == [] and list((folder / "tmp").iterdir()) == []


@pytest.fixture
def engines(tiny_engines: Path) -> Path:
    return tiny_engines


def test_run_writes_its_picture_alone(engines: Path, tmp_path: Path) -> None:
    options = ["--steps", "1", "-o", "image.png"]
    check(traced(tmp_path, "run", engines, "a", *options), tmp_path, temporary=True)


@pytest.mark.parametrize("backend", ["onnxruntime", *further("openvino")])
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


@pytest.mark.slow
def test_build_writes_its_target_and_its_cache_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--repeats", "1", "--gate", "images=1"]
    check(traced(tmp_path, "build", tiny_checkpoint, "out", *options), tmp_path, temporary=True)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["references"]


def test_inspect_writes_its_file_alone(engines: Path, tmp_path: Path) -> None:
    check(traced(tmp_path, "inspect", engines, "--json", "a.json"), tmp_path, temporary=True)


@pytest.mark.slow
def test_verify_eval_and_report_write_their_files_alone(engines: Path, tmp_path: Path) -> None:
    options = ["--against", engines, "--images", "1", "--json", "e.json"]
    check(traced(tmp_path, "verify", engines), tmp_path, temporary=True, writes=False)
    check(traced(tmp_path, "eval", engines, *options), tmp_path, temporary=True)
    check(traced(tmp_path, "report", "e.json", "-o", "e.html"), tmp_path, temporary=True)
