"""Checks of the files of an engine directory against the entries of its manifest."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.files import MANIFEST_FILE, hash_file, open_regular, restore

if TYPE_CHECKING:  # the manifest imports this module
    from latentforge.runtime.manifest import FileEntry

__all__ = ["check_file", "check_hashes", "read_content"]

_MAX_BYTES = 4 << 20
_MAX_PATH, _MAX_NAME = 512, 200  # characters; bytes
_RESERVED = frozenset('<>:"|?*\\')
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)

_HOLLOW, _HOLLOW_SHARE, _BLOCK = 1 << 30, 64, 512
"""Larger files of which the disk holds less than a 64th, in blocks, would take hours to hash."""


def read_content(path: Path) -> bytes:
    """Return the bytes of a manifest file, of 4 MiB at most.

    Raises:
        ManifestError: the file is missing, not a regular file, unreadable or too large.
    """
    hint = "is this a directory that latentforge build or export wrote?"
    try:
        if not path.exists():
            restore(path.parent)
        with open_regular(path) as file:
            content = file.read(_MAX_BYTES + 1) or b""  # nothing yet, in a file of /proc
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(f"{path.parent} has no {MANIFEST_FILE}: {hint}") from error
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}; {hint}") from error
    if len(content) > _MAX_BYTES:
        raise ManifestError(f"{path} is larger than {_MAX_BYTES >> 20} MiB: not a manifest")
    return content


def check_file(directory: Path, entry: FileEntry) -> None:
    """Check that an entry names a regular file of the recorded size, which may be a link.

    Raises:
        ManifestError: the path is not one inside the directory, or the file is missing or has
            another size.
    """
    if not _is_portable(entry.file):
        raise ManifestError(
            f"{directory}: {entry.file!r} is not a path inside the engine directory that all "
            "systems can have"
        )
    path = directory / entry.file
    try:
        status = path.stat()
    except (OSError, RuntimeError):  # also circular links
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise ManifestError(f"{directory}: no file {entry.file!r}; export again")
    size = status.st_size
    if size != entry.bytes:
        raise ManifestError(
            f"{path} has {size} bytes, but the manifest records {entry.bytes}: "
            "the file was truncated or replaced; export again"
        )
    if size > _HOLLOW and getattr(status, "st_blocks", size) * _BLOCK < size // _HOLLOW_SHARE:
        raise ManifestError(f"{path} is mostly a hole: that is not what weights are; export again")


def _is_portable(file: str) -> bool:
    """Return True for a relative path of names that every system can have, without ``..``."""
    parts = file.split("/")
    return len(file) <= _MAX_PATH and file.isprintable() and all(map(_is_portable_name, parts))


def _is_portable_name(name: str) -> bool:
    reserved = _RESERVED.intersection(name) or name[-1:] in ("", ".", " ")
    return not (reserved or _DEVICE.fullmatch(name) or len(name.encode()) > _MAX_NAME)


def check_hashes(directory: Path, entries: Sequence[FileEntry]) -> None:
    """Check the sha256 of each file; one that differs or cannot be read is a ManifestError."""
    # hashlib releases the interpreter lock, so threads run in parallel
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_hash, [directory / entry.file for entry in entries])
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry.sha256:
                raise ManifestError(
                    f"{directory / entry.file} does not have the sha256 that the manifest records: "
                    "the file was damaged or replaced; export again"
                )


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}") from error
