"""Write a directory or a file completely or not at all."""

import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentforge.runtime.errors import GateError, TargetError
from latentforge.runtime.text import size_text

try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed process then stay until someone looks
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "MANIFEST_FILE",
    "check_space",
    "check_target",
    "copy_files",
    "hash_file",
    "staged_directory",
    "staged_file",
]

MANIFEST_FILE = "manifest.json"
"""File that makes a directory an engine directory."""

_HASH_BLOCK = 1 << 20


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Raise TargetError unless a directory can be made at target.

    A stage asks before it starts, so that a typo does not cost the work.
    """
    try:
        _check_old(target, overwrite)
        parent = target.absolute().parent
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise TargetError(f"cannot write {target}: {error.strerror}") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError(f"cannot write {target}: {parent} is not a writable directory")


def check_space(directory: Path, needed: int) -> None:
    """Raise TargetError where the disk has no room for so many bytes, before they are made."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise TargetError(
            f"{directory.parent} has {size_text(free)} free and the engines take about "
            f"{size_text(needed)}: make room, or name another disk"
        )


def copy_files(files: Iterable[str], source: Path, target: Path) -> None:
    """Copy files, named relative to one directory, into another under the same names."""
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)


def _check_old(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target} exists and is not a directory: name another")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise TargetError(f"{target} exists: name another, or pass --overwrite to replace it")
        if not (target / MANIFEST_FILE).is_file():
            raise TargetError(f"{target} is not an engine directory, so it is not overwritten")


@contextmanager
def staged_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of target that becomes target when the block succeeds.

    Whatever ends the block early, Ctrl-C included, removes the sibling; what a killed
    process left is removed by the next stage that writes the same target. A GateError keeps
    the sibling as target.rejected, to be looked at.
    """
    check_target(target, overwrite=overwrite)
    target = target.absolute()
    partial = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}")
    made = [parent for parent in target.parents if not parent.exists()]
    lock: int | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        partial.mkdir()
        lock = _lock(partial)
        yield partial
        _publish(partial, target, overwrite)
    except GateError as error:
        raise GateError(f"{error}; {_reject(partial, target)}") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or error
        raise TargetError(f"cannot write {target}: {where}{reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in made:
            with suppress(OSError):  # where target is now, or somebody else's file
                parent.rmdir()


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of target that becomes target when the block succeeds."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
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
    """Hold directory until the file descriptor is closed, by us or by our death.

    Returns None where the file system has no locks, and raises BlockingIOError where another
    process holds this one.
    """
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _remove_leftovers(target: Path) -> None:
    """Delete the partial directories of processes that no longer live."""
    for leftover in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        with suppress(OSError):  # held by a process at work, or not ours to touch
            if (lock := _lock(leftover)) is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Put partial in target's place."""
    try:
        partial.rename(target)  # which an empty directory does not hinder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        check_target(target, overwrite=overwrite)  # it may have come while we worked
        _swap(partial, target)


def _reject(partial: Path, target: Path) -> str:
    """Keep partial as target.rejected, in place of an earlier one, and say so."""
    rejected = target.with_name(f"{target.name}.rejected")
    graphs = (*rejected.glob("*.onnx"), *rejected.glob("*/model.onnx"))
    ours = (rejected / MANIFEST_FILE).exists() or bool(graphs)
    try:
        if ours and not rejected.is_symlink():
            _swap(partial, rejected)
        else:
            partial.rename(rejected)
    except OSError:
        return f"not kept, since {rejected} is in the way"
    return f"kept as {rejected}"


def _swap(partial: Path, target: Path) -> None:
    """Move the old target aside, put partial in its place, and delete the old one."""
    old = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
