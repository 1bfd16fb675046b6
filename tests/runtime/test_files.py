"""A stage writes its directory completely or not at all, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentforge.runtime.errors import GateError, TargetError
from latentforge.runtime.files import check_target, staged_directory, staged_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def engines(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(text)
    return path


# Directories


def test_success(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "new"
    with staged_directory(target) as partial:
        (partial / "a").write_text("1")
        assert partial.parent == target.parent and not target.exists()
    assert (target / "a").read_text() == "1" and names(target.parent) == ["new"]


def test_the_result_has_the_mode_of_other_directories(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with staged_directory(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_early_end_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_directory(tmp_path / "deep" / "new") as partial:
        (partial / "a").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_an_early_end_leaves_the_old_directory(tmp_path: Path) -> None:
    target = engines(tmp_path / "old")
    with pytest.raises(KeyboardInterrupt), staged_directory(target, overwrite=True) as partial:
        (partial / "a").write_text("1")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["old"] and names(target) == ["manifest.json"]


def fail_the_gate(target: Path, text: str) -> str:
    with pytest.raises(GateError) as caught, staged_directory(target) as partial:
        (partial / "denoiser.onnx").write_text(text)
        raise GateError("denoiser: too far off")
    return str(caught.value)


def test_a_rejected_directory_is_kept(tmp_path: Path) -> None:
    message = fail_the_gate(tmp_path / "new", "first")
    rejected = tmp_path / "new.rejected"
    assert message == f"denoiser: too far off; kept as {rejected}"
    assert (
        names(tmp_path) == ["new.rejected"] and (rejected / "denoiser.onnx").read_text() == "first"
    )
    fail_the_gate(tmp_path / "new", "second")
    assert (
        names(tmp_path) == ["new.rejected"] and (rejected / "denoiser.onnx").read_text() == "second"
    )


def test_a_rejected_directory_replaces_no_other_files(tmp_path: Path) -> None:
    (tmp_path / "new.rejected").mkdir()
    (tmp_path / "new.rejected" / "diary").touch()
    (tmp_path / "other.rejected").touch()
    for name in ("new", "other"):
        assert "already exists" in fail_the_gate(tmp_path / name, "")
    assert names(tmp_path) == ["new.rejected", "other.rejected"]
    assert names(tmp_path / "new.rejected") == ["diary"]


def test_an_existing_target(tmp_path: Path) -> None:
    target = engines(tmp_path / "old")
    with pytest.raises(TargetError, match="--overwrite"), staged_directory(target):
        raise AssertionError("never begun")
    with staged_directory(target, overwrite=True) as partial:
        (partial / "b").touch()
    assert names(target) == ["b"] and names(tmp_path) == ["old"]


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "new") as partial:
        (partial / "b").touch()
        (tmp_path / "new").mkdir()
    assert names(tmp_path / "new") == ["b"]


def test_overwrites_engine_directories_only(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(engines(tmp_path / "engines"))
    for name in ("home", "file", "link"):
        with pytest.raises(TargetError, match=name):
            check_target(tmp_path / name, overwrite=True)
    check_target(tmp_path / "engines", overwrite=True)


def test_does_not_overwrite_a_directory_that_appeared_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with pytest.raises(TargetError, match="--overwrite"), staged_directory(target) as partial:
        (partial / "b").touch()
        engines(target, "from another process")
    assert names(tmp_path) == ["new"] and names(target) == ["manifest.json"]


def test_an_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent in (tmp_path / "file", Path("/proc")):
        with pytest.raises(TargetError, match=str(parent)), staged_directory(parent / "new"):
            raise AssertionError("never begun")


@pytest.mark.parametrize("length", [230, 300, 5000])
def test_a_name_too_long(tmp_path: Path, length: int) -> None:
    if length < 255:  # fits, but not with the suffix of the sibling
        length = 254
    with (
        pytest.raises(TargetError, match="cannot write"),
        staged_directory(tmp_path / ("x" * length)),
    ):
        raise AssertionError("never begun")
    assert names(tmp_path) == []


# Leftovers

HOLD = """
import sys, time
from pathlib import Path
from latentforge.runtime.files import staged_directory
with staged_directory(Path(sys.argv[1])) as partial:
    (partial / "a").write_text("1")
    print("ready", flush=True)
    time.sleep(60)
"""


def holding(target: Path) -> subprocess.Popen[str]:
    """Return a process that is writing target."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    process.send_signal(number)
    process.communicate(timeout=30)


@pytest.mark.parametrize("name", ["new", "odd [*]"])
def test_removes_the_leftovers_of_a_killed_process(tmp_path: Path, name: str) -> None:
    end(holding(tmp_path / name), signal.SIGKILL)
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(f".{name}.partial-")
    with staged_directory(tmp_path / name) as partial:
        assert names(tmp_path) == [partial.name]
    assert names(tmp_path) == [name]


def test_leaves_a_live_process_alone(tmp_path: Path) -> None:
    process = holding(tmp_path / "new")
    try:
        partial = names(tmp_path)
        with staged_directory(tmp_path / "new"):
            assert set(partial) < set(names(tmp_path))
        assert (tmp_path / partial[0] / "a").read_text() == "1"
    finally:
        end(process, signal.SIGKILL)


@pytest.mark.timeout(20)  # opening a pipe blocks
def test_leaves_files_alone_that_only_look_like_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "diary").touch()
    (tmp_path / ".new.partial-link").symlink_to(folder)
    (tmp_path / ".new.partial-file").touch()
    os.mkfifo(tmp_path / ".new.partial-pipe")
    before = len(os.listdir("/proc/self/fd"))
    with staged_directory(tmp_path / "new"):
        pass
    assert names(folder) == ["diary"]
    left = [f".new.partial-{kind}" for kind in ("file", "link", "pipe")]
    assert names(tmp_path) == [*left, "folder", "new"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    end(holding(tmp_path / "deep" / "new"), signal.SIGINT)
    assert names(tmp_path) == []


def test_a_kill_at_any_moment_leaves_a_complete_target_or_none(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from latentforge.runtime.files import staged_directory
print("ready", flush=True)
while True:
    with staged_directory(Path(sys.argv[1]), overwrite=True) as partial:
        (partial / "manifest.json").write_text("x" * 1000)
        (partial / "other").write_text("x" * 1000)
"""
    target = tmp_path / "new"
    for delay in (0.0, 0.003, 0.01, 0.03):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(delay)
        end(process, signal.SIGKILL)
        if target.exists():
            assert {path.name: path.stat().st_size for path in target.iterdir()} == {
                "manifest.json": 1000,
                "other": 1000,
            }
    with staged_directory(target, overwrite=True) as partial:
        (partial / "c").touch()
    assert names(tmp_path) == ["new"] and names(target) == ["c"]


# Full disks: exceeding a limit on file sizes is an OSError, as on a full disk.

FILL = """
import resource, signal, sys
from pathlib import Path
from latentforge.runtime.errors import TargetError
from latentforge.runtime.files import staged_directory, staged_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
target = Path(sys.argv[1])
try:
    if sys.argv[2] == "file":
        with staged_file(target) as partial:
            partial.write_bytes(bytes(10_000))
    else:
        with staged_directory(target) as partial:
            (partial / "small").write_bytes(bytes(10))
            (partial / "large").write_bytes(bytes(10_000))
except TargetError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_full_disk(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "new"
    result = subprocess.run(
        [sys.executable, "-c", FILL, str(target), kind], capture_output=True, text=True, check=True
    )
    assert result.stdout == (
        f"cannot write {target}: a file above 4 KB is larger than the system or the disk allows: "
        "raise ulimit -f, or choose another disk\n"
    )
    assert names(tmp_path) == []


# Files


def test_a_file(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_text("old")
    with staged_file(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_early_end_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.png"
    target.write_text("old")
    with pytest.raises(error), staged_file(target) as partial:
        partial.write_text("new")
        raise error
    assert target.read_text() == "old" and names(tmp_path) == ["a.png"]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    for target in (tmp_path / "missing" / "a.png", tmp_path / "directory"):
        with pytest.raises(TargetError, match="cannot write"), staged_file(target) as partial:
            partial.write_text("new")
    assert names(tmp_path) == ["directory"]


def test_two_writers_of_one_file_do_not_interfere(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    with staged_file(target) as first, staged_file(target) as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert target.read_text() == "1"


# Kills between the renames of an overwrite

DIE = """
import os, signal, sys
from pathlib import Path
from latentforge.runtime import files
if sys.argv[2] == "two steps":
    files._exchange = lambda first, second: False
rename, left = os.rename, int(sys.argv[3])
def dying(*paths):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    rename(*paths)
os.rename = dying
with files.staged_directory(Path(sys.argv[1]), overwrite=True) as partial:
    (partial / "manifest.json").write_text("new")
"""


@pytest.mark.parametrize("renames", range(4))
@pytest.mark.parametrize("kind", ["one step", "two steps"])
def test_a_kill_at_any_rename_loses_no_engines(tmp_path: Path, kind: str, renames: int) -> None:
    target = engines(tmp_path / "new")
    subprocess.run([sys.executable, "-c", DIE, str(target), kind, str(renames)], check=False)
    with pytest.raises(KeyboardInterrupt), staged_directory(target, overwrite=True):
        assert (target / "manifest.json").read_text() in ("old", "new")
        raise KeyboardInterrupt
    assert (target / "manifest.json").read_text() in ("old", "new")
    assert names(tmp_path) == ["new"]


def test_engines_that_were_set_aside_get_their_name_back(tmp_path: Path) -> None:
    target = tmp_path / "new"
    engines(tmp_path / ".new.previous-0123abcd")
    with pytest.raises(TargetError, match="--overwrite"):
        check_target(target)
    assert (target / "manifest.json").read_text() == "old"
    engines(tmp_path / ".new.previous-4567abcd", "older")  # of a process that had done its work
    check_target(target, overwrite=True)
    assert names(tmp_path) == ["new"] and (target / "manifest.json").read_text() == "old"


def test_nothing_else_gives_way_to_engines_that_were_set_aside(tmp_path: Path) -> None:
    engines(tmp_path / ".new.previous-0123abcd")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "diary").touch()
    with pytest.raises(TargetError, match="not an engine directory"):
        check_target(tmp_path / "new", overwrite=True)
    assert names(tmp_path) == [".new.previous-0123abcd", "new"]
