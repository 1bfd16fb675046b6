"""A disk that becomes full while a command writes: one line, and old files stay."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TEXT_ENCODER, Handmade
from planted import environment
from tiers import further

pytest.importorskip("onnx")
from hostile_disks import FILLER, PROGRAM
from hostile_engines import DECODER, DENOISER

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
HERE = str(Path(__file__).parent)
FULL = "its disk is full, with "


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def engines(handmade: Handmade) -> Path:
    parts = {"text_encoder": TEXT_ENCODER, "denoiser": DENOISER, "vae_decoder": DECODER}
    return handmade("engines", onnx=parts)


def run(
    disk: Path, count: int, *arguments: str | Path, temporary: Path | None = None
) -> tuple[int, str]:
    """Run a command whose disk is full from a change on; return its status and its message."""
    (disk / FILLER).unlink(missing_ok=True)
    variables = environment(PYTHONPATH=SOURCE, TMPDIR=str(temporary or disk.parent))
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, HERE, str(disk), str(count), *map(str, arguments)],
        cwd=disk,
        env=variables,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("latentforge:")]
    return ended.returncode, "\n".join(line for line in lines if " truncated " not in line)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != FILLER)


def sweep(disk: Path, target: str, *arguments: str | Path, step: int = 1) -> int:
    """Fill the disk at one change after the other, up to the last; return the number of refusals.

    What had the target's name before is still there after a refusal.
    """
    count, before = 0, tree(disk)
    while True:
        status, message = run(disk, count, *arguments)
        if status == 0:
            return count // step
        named = message.startswith(f"latentforge: cannot write {target}") and FULL in message
        early = " has 0 KB free, but the engines need about " in message and str(disk) in message
        assert status == 2 and (named or early) and ".partial" not in message, (count, message)
        assert message.count("\n") == 0 and tree(disk) == before, (count, message, tree(disk))
        count += step


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of a folder, without the file that fills its disk."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != FILLER)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        (("run", "ENGINES", "a", "--steps", "1", "-o", "old.png"), "old.png"),
        *further((("inspect", "ENGINES", "--json", "old.json"), "old.json")),
    ],
)
def test_a_file_on_a_full_disk(
    arguments: tuple[str, ...], target: str, disk: Path, engines: Path
) -> None:
    (disk / target).write_text("old")
    assert sweep(disk, target, *(w.replace("ENGINES", str(engines)) for w in arguments)) > 0
    assert (disk / target).read_bytes() != b"old"


def test_engines_on_a_full_disk(disk: Path, engines: Path) -> None:
    command = ("compile", engines, "out", "--backend", "onnxruntime")
    assert sweep(disk, str(disk / "out"), *command, step=5) > 1
    assert names(disk) == ["out"]


def test_a_full_temporary_folder(disk: Path, engines: Path) -> None:
    status, message = run(disk, 1, "inspect", engines, "--layers", "3", temporary=disk)
    assert status == 2 and FULL in message and "set TMPDIR" in message
    assert names(disk) == []


@pytest.mark.parametrize(("stream", "status"), [("stdout", 2), ("stderr", 0)])
def test_a_full_standard_stream(stream: str, status: int, engines: Path) -> None:
    """Progress and messages that cannot be printed fail nothing."""
    command = [sys.executable, "-P", "-m", "latentforge", "inspect", str(engines), "--layers", "1"]
    with open("/dev/full", "w") as full:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        variables = environment(PYTHONPATH=SOURCE)
        ended = subprocess.run(command, env=variables, text=True, **pipes)  # type: ignore[call-overload]
    assert ended.returncode == status
    if stream == "stdout":
        reason = os.strerror(28)
        assert ended.stderr == f"latentforge: cannot write standard output: {reason}\n"


_EVAL = ("eval", "ENGINES", "--against", "ENGINES", "--images", "1")
SLOW: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "compile": (4, "out", ("compile", "ENGINES", "out", "--backend", "openvino")),
    "optimize": (9, "out", ("optimize", "ENGINES", "out", "--steps", "1", "--overwrite")),
    "export": (9, "out", ("export", "CHECKPOINT", "out")),
    "build": (40, "out", ("build", "CHECKPOINT", "out", "--repeats", "0", "--overwrite")),
    "bench": (1, "old.json", ("bench", "ENGINES", "--repeats", "1", "--json", "old.json")),
    "eval": (1, "old.html", (*_EVAL, "--html", "old.html")),
}
"""Steps between the changes at which the disk is filled, the target, and the command."""


@pytest.mark.slow
@pytest.mark.timeout(5000)
@pytest.mark.parametrize("name", SLOW)
def test_every_command_on_a_full_disk(
    name: str, disk: Path, engines: Path, tiny_checkpoint: Path
) -> None:
    step, target, arguments = SLOW[name]
    places = {"ENGINES": str(engines), "CHECKPOINT": str(tiny_checkpoint)}
    if target == "out" and "--overwrite" in arguments:
        shutil.copytree(engines, disk / "out")
    if target != "out":
        (disk / target).write_text("old")
    shown = str(disk / "out") if target == "out" else target
    refusals = sweep(disk, shown, *(places.get(word, word) for word in arguments), step=step)
    print(name, refusals, "refusals")
    assert refusals > 0
