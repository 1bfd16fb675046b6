"""A kill at any moment of --overwrite leaves the old engines or the new ones, whole."""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TEXT_ENCODER, Handmade

pytest.importorskip("onnx")
from hostile_engines import DECODER, DENOISER
from hostile_kills import killed_at_change, killed_at_moment, killed_fork

from latentforge.runtime import files
from latentforge.runtime.files import copy_files, staged_directory
from latentforge.runtime.manifest import Manifest

ONNX = {"text_encoder": TEXT_ENCODER, "denoiser": DENOISER, "vae_decoder": DECODER}


def state(target: Path, old: Manifest) -> str:
    """Return which engines stand at target, once their hashes are checked."""
    return "old" if Manifest.read(target) == old else "new"


def interrupt(target: Path) -> None:
    """Begin to overwrite a target, and be interrupted."""
    with pytest.raises(KeyboardInterrupt), staged_directory(target, overwrite=True):
        raise KeyboardInterrupt


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewrite(source: Path, target: Path) -> None:
    """Write engines as every stage does."""
    with staged_directory(target, overwrite=True) as partial:
        manifest = Manifest.read(source)
        copy_files((entry.file for entry in manifest.files), source, partial)
        manifest.write(partial)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_every_change(
    handmade: Handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    source, old = handmade("source"), handmade("old")
    work = tmp_path / "work"
    work.mkdir()
    target, before = work / "target", Manifest.read(old)
    ends: Counter[str] = Counter()
    for count in range(200):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(old, target)
        died = killed_fork(lambda: rewrite(source, target), work, count)
        if exchanges:
            assert (target / "manifest.json").is_file()
        interrupt(target)
        ends[state(target, before)] += 1
        assert names(work) == ["target"]
        if not died:
            break
    assert not died and ends["old"] > 10 and ends["new"] > 3


def check(
    kill: Callable[[Path, int], bool], old: Path, folder: Path, indices: range
) -> Counter[str]:
    """Kill a command again and again while it overwrites, and return what stood afterwards."""
    work, before = folder / "work", Manifest.read(old)
    work.mkdir()
    ends: Counter[str] = Counter()
    for index in indices:
        target = work / "target"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(old, target)
        died = kill(work, index)
        assert (target / "manifest.json").is_file(), (index, names(work))
        interrupt(target)
        ends[f"{'killed' if died else 'done'}, {state(target, before)}"] += 1
        assert names(work) == ["target"], index
    print(dict(ends))
    return ends


def killer(
    arguments: Callable[[Path], list[str]], changes: int, seconds: float
) -> Callable[[Path, int], bool]:
    """Return a function that kills a command: at a change, or every third time at a moment."""

    def kill(work: Path, index: int) -> bool:
        command, numbers = arguments(work / "target"), random.Random(index)
        if index % 3 == 2:
            return killed_at_moment(command, work, numbers.uniform(0, seconds))
        return killed_at_change(command, work, numbers.randrange(changes))

    return kill


def measured(arguments: list[str], work: Path) -> tuple[int, float]:
    """Return the number of changes of a command, and its duration."""
    start, low, high = time.monotonic(), 0, 1
    while killed_at_change(arguments, work, high):
        low, high = high, high * 2
        start = time.monotonic()
    seconds = time.monotonic() - start
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if killed_at_change(arguments, work, middle) else (low, middle)
    return high, seconds


COMMANDS: dict[str, tuple[int, Callable[[Path, Path], list[str]]]] = {
    "compile": (
        110,
        lambda source, target: (
            ["compile", str(source), str(target), "--backend", "onnxruntime", "--overwrite"]
            + ["--option", "optimized=false"]
        ),
    ),
    "optimize": (
        60,
        lambda source, target: (
            ["optimize", str(source), str(target), "--overwrite", "--repeats", "0"]
            + ["--gate", "psnr=0"]
        ),
    ),
    "export": (
        30,
        lambda source, target: ["export", str(source), str(target), "--overwrite"],
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("name", COMMANDS)
def test_all_kills(handmade: Handmade, tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    count, arguments = COMMANDS[name]
    source = tiny_checkpoint if name == "export" else handmade("source", onnx=ONNX)
    trial = tmp_path / "trial"
    trial.mkdir()
    changes, seconds = measured(arguments(source, trial / "target"), trial)
    print(name, changes, "changes", seconds)
    kill = killer(lambda target: arguments(source, target), changes, seconds)
    ends = check(kill, handmade("old"), tmp_path, range(count))
    assert ends["killed, old"] > count / 3
