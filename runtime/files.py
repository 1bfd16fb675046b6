"""File hashes, and atomic writing: a directory or a file is complete or does not exist."""

import ctypes
import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from latentforge.runtime.cleanups import at_forced_end
from latentforge.runtime.disk import naming_full_disk
from latentforge.runtime.errors import GateError, TargetError
from latentforge.runtime.text import size_text

try:
    import fcntl
except ImportError:  # Windows: the leftovers of a killed process stay until a user deletes them
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "ENGINES",
    "MANIFEST_FILE",
    "DirectoryKind",
    "check_file_target",
    "check_target",
    "copy_files",
    "hash_file",
    "link_files",
    "locked_directory",
    "open_regular",
    "read_file",
    "restore",
    "scratch_folder",
    "staged_directory",
    "staged_file",
]

MANIFEST_FILE = "manifest.json"
"""File that makes a directory an engine directory."""


@dataclass(frozen=True)
class DirectoryKind:
    """Kind of directory that a command may be allowed to replace.

    Attributes:
        file: that makes a directory one of this kind, so that no other is replaced.
        noun: with its article, for messages.
        without: file that makes it one of another kind; empty if there is none.
    """

    file: str
    noun: str
    without: str = ""

    def includes(self, directory: Path) -> bool:
        """Return True if a directory is of this kind."""
        is_other = bool(self.without) and (directory / self.without).exists()
        return (directory / self.file).is_file() and not is_other


ENGINES = DirectoryKind(MANIFEST_FILE, "an engine directory")

_HASH_BLOCK = 1 << 20
_LONGEST_SUFFIX = ".12345678.partial."  # of the siblings of a file
_UNBLOCKED = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size  # a file that grows meanwhile has another hash
        while block := file.read(min(left, _HASH_BLOCK)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, also through links.

    Raises:
        OSError: it is something else, such as a pipe, which would block a reader forever.
    """
    _check_regular(path.stat().st_mode, path)  # first, as opening a device may have an effect
    file = os.fdopen(os.open(path, os.O_RDONLY | _UNBLOCKED), "rb")
    try:
        _check_regular(os.fstat(file.fileno()).st_mode, path)
    except OSError:
        file.close()
        raise
    return file


def read_file(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it is missing, larger, or something else, such as a pipe.
    """
    with open_regular(path) as file:
        stated = os.fstat(file.fileno()).st_size
        content = b"" if stated > limit else file.read(limit + 1)
    if max(stated, len(content)) > limit:
        raise OSError(errno.EFBIG, f"larger than {size_text(limit)}", str(path))
    return content


def _check_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def check_target(target: Path, *, overwrite: bool = False, kind: DirectoryKind = ENGINES) -> None:
    """Check that a directory can be created at target, where overwrite allows one of its kind.

    Stages call this before they start, so that a typo does not cost the work.

    Raises:
        TargetError: something else is there, or its parent is not writable.
    """
    try:
        restore(target, kind)
        _check_old(target, overwrite, kind)
        parent = next(parent for parent in target.absolute().parents if parent.exists())
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot write {target}: {_reason(error)}") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError(f"cannot write {target}: {parent} is not a writable directory")


def copy_files(files: Iterable[str], source: Path, target: Path) -> None:
    """Copy files, named relative to one directory, into another under the same names."""
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)


def link_files(files: Iterable[str], source: Path, target: Path) -> None:
    """Make hard links of files as copy_files() copies them, or copies where there can be no links.

    A file that is a symbolic link becomes one of what it leads to.
    """
    for file in dict.fromkeys(files):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(source / file), target / file)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source / file, target / file)


def _check_old(target: Path, overwrite: bool, kind: DirectoryKind) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target} exists and is not a directory: choose another name")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise TargetError(
                f"{target} exists: choose another name, or pass --overwrite to replace it"
            )
        if not kind.includes(target):
            raise TargetError(f"{target} is not {kind.noun}, so it is not overwritten")


@contextmanager
def scratch_folder(directory: Path, name: str) -> Iterator[Path]:
    """Make a folder in a directory for the files of a block, and delete it afterwards."""
    folder = directory / name
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged_directory(
    target: Path, *, overwrite: bool = False, kind: DirectoryKind = ENGINES
) -> Iterator[Path]:
    """Yield a temporary sibling of target that is renamed to target when the block succeeds.

    Missing parents are created, and overwrite replaces an existing directory of the kind. If the
    block ends early, also by Ctrl-C, the sibling is removed. The next stage that writes the same
    target removes the sibling of a killed process. After a GateError the sibling is kept as
    target.rejected, for inspection. The old directory stands until the new one is on the disk and
    under its name.

    Raises:
        TargetError: the directory cannot be written.
        GateError: raised by the block; its message gains the place of the rejected directory.
    """
    check_target(target, overwrite=overwrite, kind=kind)
    target = target.absolute()
    try:
        with _partial_directory(target, kind) as partial:
            try:
                yield partial
                _publish(partial, target, overwrite, kind)
            except GateError as error:
                raise GateError(f"{error}; {_reject(partial, target)}") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise TargetError(f"cannot write {target}: {where}{error.strerror or error}") from error


@contextmanager
def _partial_directory(target: Path, kind: DirectoryKind) -> Iterator[Path]:
    """Make a locked sibling of target, and delete afterwards what has that name."""
    partial = _sibling(target)
    created = [parent for parent in target.parents if not parent.exists()]
    lock: int | None = None
    with at_forced_end(lambda: _discard_at_once(partial, target, created)):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            restore(_rejected(target), kind)
            partial.mkdir()
            lock = _lock(partial)
            with naming_full_disk(target, partial):
                yield partial
        finally:
            _discard(partial, created)
            if lock is not None:
                os.close(lock)


def _discard(partial: Path, created: Sequence[Path]) -> None:
    """Delete a partial directory, and of the parents that were created for it the empty ones."""
    shutil.rmtree(partial, ignore_errors=True)
    for parent in created:
        with suppress(OSError):  # not empty: it holds target, or a file of another program
            parent.rmdir()


def _discard_at_once(partial: Path, target: Path, created: Sequence[Path]) -> None:
    """Delete a partial directory that another thread is about to publish, which then fails."""
    unwanted = _sibling(target)
    with suppress(OSError):  # it is published, or was never made
        partial.rename(unwanted)
    _discard(unwanted, created)


def check_file_target(path: Path) -> None:
    """Check before long work that a file can be written.

    Raises:
        TargetError: its directory is missing or not writable, its name is too long, or something
            else than a file is there, such as a device.
    """
    parent = path.absolute().parent
    try:
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "a device or a pipe"
            raise TargetError(f"cannot write {path}: it is {kind}; name a file")
        os.lstat(parent / f"{path.name}{_LONGEST_SUFFIX}")
    except FileNotFoundError:
        _check_writable(path, parent)
    except (OSError, ValueError) as error:  # the latter of names that no file can have
        raise TargetError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _check_writable(path: Path, parent: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=parent):  # root may write whatever permissions say
            pass
    except OSError as error:
        raise TargetError(f"cannot write {path}: {parent}: {error.strerror}") from error


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes target when the block succeeds.

    Raises TargetError if the file cannot be written.
    """
    check_file_target(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with naming_full_disk(target, partial), at_forced_end(partial.unlink):
            yield partial
            partial.replace(target)
    except OSError as error:
        raise TargetError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sibling(target: Path) -> Path:
    """Return a new name beside target, which _remove_leftovers() recognizes."""
    return target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Keep other processes that ask for the same lock out of a directory inside of the block.

    The lock ends with this process, however that ends. File systems without locks, and Windows,
    keep nobody out.

    Raises:
        TargetError: another process has the lock, or the directory cannot be opened.
    """
    try:
        lock = _lock(directory)
    except BlockingIOError as error:
        raise TargetError(
            f"{directory} is in use by another run: wait until it ends, or name another folder"
        ) from error
    except OSError as error:
        raise TargetError(f"cannot open {directory}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """Lock directory until the returned file descriptor is closed, or this process ends.

    It is None if the file system has no locks. BlockingIOError: another process holds the lock.
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
    """Delete the partial directories of processes that have ended."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        with suppress(OSError):  # locked by a running process, or not writable
            if (lock := _lock(leftover)) is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


def _publish(partial: Path, target: Path, overwrite: bool, kind: DirectoryKind) -> None:
    """Rename partial to target, in place of a directory of the kind that may be there."""
    try:
        partial.rename(target)  # also replaces an empty directory
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        check_target(target, overwrite=overwrite, kind=kind)  # it may have been created meanwhile
        _swap(partial, target)


def _rejected(target: Path) -> Path:
    return target.with_name(f"{target.name}.rejected")


def _reject(partial: Path, target: Path) -> str:
    """Keep partial as target.rejected, replacing an earlier one; return a note for the message."""
    rejected = _rejected(target)
    graphs = (*rejected.glob("*.onnx"), *rejected.glob("*/model.onnx"))
    try:
        if (graphs or (rejected / MANIFEST_FILE).exists()) and not rejected.is_symlink():
            _swap(partial, rejected)
        else:
            partial.rename(rejected)
    except OSError:
        return f"not kept, because {rejected} already exists"
    return f"kept as {rejected}"


def _swap(partial: Path, target: Path) -> None:
    """Replace target by partial, so that one of the two has the name at every moment.

    Files reach the disk first: after a power failure, too, the old engines or the new ones are
    whole.
    """
    for folder, _, files in os.walk(partial):
        for name in (*files, "."):
            _flush(Path(folder, name))
    if _exchange(partial, target):
        _flush(target.parent)
        shutil.rmtree(partial, ignore_errors=True)
    else:
        _set_aside(partial, target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two directories in one step; False if the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old C library
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return bool(renameat2(_HERE, paths[0], _HERE, paths[1], _EXCHANGE) == 0)


def _set_aside(partial: Path, target: Path) -> None:
    """Replace target in two steps; restore() finds the old one if the process ends in between."""
    old = target.with_name(f".{target.name}.previous-{secrets.token_hex(4)}")
    lock = _lock(target)  # so that nobody takes it for that of a killed process
    try:
        with at_forced_end(lambda: _settle(old, target)):
            target.rename(old)
            partial.rename(target)
            _flush(target.parent)
    finally:
        _settle(old, target)
        if lock is not None:
            os.close(lock)


def _settle(old: Path, target: Path) -> None:
    """Give an old directory its name back, or delete it if the new one has it."""
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def restore(target: Path, kind: DirectoryKind = ENGINES) -> None:
    """Give a directory its name back that a killed process set aside while it replaced it.

    If there is one of the kind at target, then its work was done, and the old one is deleted.
    """
    for old in target.absolute().parent.glob(f".{glob.escape(target.name)}.previous-*"):
        with suppress(OSError):  # locked by a running process, or not writable
            lock = _lock(old)
            try:
                if kind.includes(target):
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.rename(target)  # also in place of an empty directory
            finally:
                if lock is not None:
                    os.close(lock)


def _flush(path: Path) -> None:
    """Wait until a file or a directory is on the disk, where the system can tell."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
