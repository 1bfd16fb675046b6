"""Write a directory or a file completely or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentforge.runtime.errors import GateError, TargetError
from latentforge.runtime.manifest import FILENAME

try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed process then stay until someone looks
    fcntl = None  # type: ignore[assignment]

__all__ = ["check_target", "staged_directory", "staged_file"]


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Raise TargetError unless a directory can be made at target.

    A stage asks before it starts, so that a typo does not cost the work.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target} exists and is not a directory: name another")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise TargetError(f"{target} exists: name another, or pass --overwrite to replace it")
        if not (target / FILENAME).is_file():
            raise TargetError(f"{target} is not an engine directory, so it is not overwritten")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError(f"cannot write {target}: {parent} is not a writable directory")


@contextmanager
def staged_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of target that becomes target when the block succeeds.

    Whatever ends the block early, Ctrl-C included, removes the sibling; what a killed
    process left is removed by the next stage that writes the same target. A GateError keeps
    the sibling as target.rejected, to be looked at.
    """
    check_target(target, overwrite=overwrite)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    partial = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    partial.chmod(0o755)
    lock = _lock(partial)
    try:
        yield partial
        _replace(partial, target)
    except GateError:
        _replace(partial, target.with_name(f"{target.name}.rejected"))
        raise
    except OSError as error:
        raise TargetError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of target that becomes target when the block succeeds."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        raise TargetError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _lock(directory: Path) -> int | None:
    """Hold directory until the file descriptor is closed, by us or by our death."""
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_leftovers(target: Path) -> None:
    """Delete the partial directories of processes that no longer live."""
    for leftover in target.parent.glob(f"{_prefix(target)}*"):
        with suppress(OSError):  # held by a process at work, or not ours to touch
            if (lock := _lock(leftover)) is not None:
                shutil.rmtree(leftover)
                os.close(lock)


def _replace(partial: Path, target: Path) -> None:
    """Put partial in target's place; an old target is moved aside first and then deleted."""
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
