"""Full disks: refused beforehand, or named where a library reports them in words of its own."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentforge.runtime.errors import (
    BackendError,
    CheckpointError,
    LatentforgeError,
    ManifestError,
    TargetError,
)

__all__ = ["check_space", "naming_full_disk"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = tuple(map(os.strerror, _FULL))
_REST = 1 << 16
"""Bytes free on a disk that a library has filled."""

_VAGUE = (BackendError, CheckpointError, ManifestError)
"""Errors that may quote a library which met a full disk; the others are as they say."""


def check_space(directory: Path, needed: int) -> None:
    """Check that a directory's disk has `needed` bytes free; if not, raise a TargetError."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise TargetError(
            f"{directory.parent} has {_size(free)} free, but the engines need about "
            f"{_size(needed)}: free some space, or choose another disk"
        )


@contextmanager
def naming_full_disk(
    target: Path, place: Path | None = None, advice: str = "choose another disk"
) -> Iterator[None]:
    """Turn an error of the block into one that names a full disk, if that is its cause.

    Libraries report a full disk in many ways, numpy by an OSError without a number.

    Args:
        target: the file or directory that the block writes, to be named.
        place: where it is written until it is complete; target itself if None.
        advice: alternative to freeing space.

    Raises:
        TargetError: the disk is full, or a file larger than is allowed.
    """
    try:
        yield
    except TargetError as error:  # of a file in place, which will have another name
        raise TargetError(str(error).replace(str(place or target), str(target))) from error
    except Exception as error:
        if reason := _reason(error, place or target, advice):
            raise TargetError(f"cannot write {target}: {reason}") from error
        raise


def _reason(error: Exception, place: Path, advice: str) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if os.strerror(errno.EFBIG) in str(error):  # and not a limit of what is read
        return (
            f"a file above {_size(_largest(place))} is larger than the system or the disk allows: "
            f"raise ulimit -f, or {advice}"
        )
    if number in _FULL or (_may_be_full(error) and _is_full(error, place)):
        free = shutil.disk_usage(_existing(place)).free
        return (
            f"its disk is full, with {_size(free)} free after the first {_size(_written(place))}: "
            f"free some space, or {advice}"
        )
    return None


def _may_be_full(error: Exception) -> bool:
    """Return True for errors that do not name their cause."""
    if isinstance(error, LatentforgeError):
        return isinstance(error, _VAGUE)
    return not isinstance(error, MemoryError | ImportError) and not getattr(error, "errno", None)


def _is_full(error: Exception, place: Path) -> bool:
    if any(text in str(error) for text in _FULL_TEXTS):
        return True
    return shutil.disk_usage(_existing(place)).free < _REST


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.absolute().parents) if path.exists())


def _sizes(place: Path) -> list[int]:
    """Return the sizes of a file, or of the files in a directory."""
    sizes = []
    for path in (place, *place.rglob("*")):
        with suppress(OSError):  # another process deletes it
            if path.is_file() and not path.is_symlink():
                sizes.append(path.stat().st_size)
    return sizes


def _largest(place: Path) -> int:
    return max(_sizes(place), default=0)


def _written(place: Path) -> int:
    return sum(_sizes(place))


def _size(count: int) -> str:
    """Return a number of bytes, exact enough to tell what is free from what is needed."""
    if count < 10e6:
        return f"{count / 1e3:,.0f} KB"
    return f"{count / 1e6:,.0f} MB" if count < 100e9 else f"{count / 1e9:,.0f} GB"
