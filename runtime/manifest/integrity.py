"""Checks of the files of an engine directory against the entries of its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.files import MANIFEST_FILE, hash_file, restore

if TYPE_CHECKING:  # the manifest imports this module
    from latentforge.runtime.manifest import FileEntry

__all__ = ["check_file", "check_hashes", "read_content"]

_MAX_BYTES = 4 << 20


def read_content(path: Path) -> bytes:
    """Return the bytes of a manifest file, of 4 MiB at most.

    Raises:
        ManifestError: the file is missing, not a regular file, unreadable or too large.
    """
    hint = "is this a directory that latentforge build or export wrote?"
    try:
        if not path.exists():
            restore(path.parent)
        if not path.is_file():  # a pipe, say, would block the reader forever
            raise ManifestError(f"{path.parent} has no {MANIFEST_FILE}: {hint}")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}; {hint}") from error
    if len(content) > _MAX_BYTES:
        raise ManifestError(f"{path} is larger than {_MAX_BYTES >> 20} MiB: not a manifest")
    return content


def check_file(directory: Path, entry: FileEntry) -> None:
    """Check that an entry names a regular file inside the directory, of the recorded size.

    Raises:
        ManifestError: the path leads outside, also through a link, or the file is missing or has
            another size.
    """
    pure = PurePosixPath(entry.file)
    if not entry.file.isprintable() or pure.is_absolute() or ".." in pure.parts:
        raise ManifestError(
            f"{directory}: {entry.file!r} is not a path inside the engine directory"
        )
    path = directory / entry.file
    try:
        inside = path.resolve().is_relative_to(directory.resolve())
        size = path.stat().st_size if inside and path.is_file() else None
    except (OSError, RuntimeError):  # name too long, circular links
        inside, size = True, None
    if not inside:
        raise ManifestError(f"{directory}: {entry.file!r} is outside the engine directory")
    if size is None:
        raise ManifestError(f"{directory}: no file {entry.file!r}; export again")
    if size != entry.bytes:
        raise ManifestError(
            f"{path} has {size} bytes, but the manifest records {entry.bytes}: "
            "the file was truncated or replaced; export again"
        )


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
