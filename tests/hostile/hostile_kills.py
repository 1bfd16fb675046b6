"""Kills of a process at its n-th change of the file system, or at a moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["die_at", "killed_at_change", "killed_at_moment", "killed_fork"]

CHANGES = frozenset(
    ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate", "os.symlink")
    + ("shutil.copyfile", "shutil.rmtree", "ctypes.dlsym", "open")
)
"""Audit events of changes: sys.addaudithook() is called before each of them."""

_PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from hostile_kills import die_at
die_at(sys.argv.pop(1), int(sys.argv.pop(1)))
from latentforge.__main__ import main
sys.exit(main())
"""


def die_at(folder: str, count: int) -> list[int]:
    """Kill this process before its change of a number inside a folder.

    Returns:
        The number of changes so far, as the only item.
    """
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and _changes(event, arguments, folder):
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1

    sys.addaudithook(hook)
    return seen


def _changes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "ctypes.dlsym":
        return arguments[-1] == "renameat2"
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return False
    paths = (os.fspath(path) for path in arguments if isinstance(path, str | os.PathLike))
    return any(path.startswith(folder) for path in paths)


def killed_fork(work: Callable[[], object], folder: Path, count: int) -> bool:
    """Do some work in a forked process that dies at a change; True if it did."""
    child = os.fork()
    if child == 0:
        try:
            die_at(str(folder), count)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _started(arguments: Sequence[str], folder: Path, count: int) -> subprocess.Popen[bytes]:
    place = str(Path(__file__).parent)
    command = [sys.executable, "-c", _PROGRAM, place, str(folder), str(count), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes]) -> bool:
    """Kill what is left of a command, its processes too; True if the command was killed."""
    status = process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return status == -signal.SIGKILL


def killed_at_change(arguments: Sequence[str], folder: Path, count: int) -> bool:
    """Run a command that dies at a change; True if it did."""
    return _end(_started(arguments, folder, count))


def killed_at_moment(arguments: Sequence[str], folder: Path, seconds: float) -> bool:
    """Run a command and kill it after a while, with its processes; True if it had not ended."""
    process = _started(arguments, folder, -1)
    time.sleep(seconds)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return _end(process)
