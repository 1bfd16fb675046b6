"""Images that users share: kept on disk under random names, until they expire.

Each image lies in the folder once, under its SHA-256; each share of it is a record under an
identifier of 128 random bits, so that whoever could make the same image still finds no link to it.
A file's time of modification is the moment at which it expires. Nothing else is kept, so that a
restart loses no link and several servers can use one folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import read_file, staged_file
from latentforge.runtime.record import Record
from latentforge.runtime.text import size_text
from latentforge.serve.errors import ServeError

try:
    import fcntl
except ImportError:  # Windows: one server per folder
    fcntl = None  # type: ignore[assignment]

__all__ = ["Caption", "ShareFullError", "ShareStore", "SharedImage"]

_IDENTIFIER = re.compile(r"[0-9a-f]{32}")
_MAX_RECORD = 1 << 18  # bytes: a prompt of MAX_PROMPT characters, each escaped, and the rest
_LOCK = ".lock"


class ShareFullError(ServeError):
    """Image for which the folder of shared ones has no room."""

    status, kind, code = 503, "server_error", "shares_full"


class Caption(Record, frozen=True, kw_only=True):
    """Text that is shown with a shared image."""

    prompt: str
    model: str
    seed: int
    width: int
    height: int


class SharedImage(Record, frozen=True, kw_only=True):
    """Share of an image.

    Attributes:
        id: unguessable name, which is in the link.
        digest: SHA-256 of the PNG file, in hexadecimal.
        created, expires: in seconds since 1970.
    """

    id: str
    digest: str
    caption: Caption
    created: float
    expires: float


@dataclass(frozen=True, kw_only=True)
class ShareStore:
    """Folder of shared images, of bounded size. Its methods may be called from several threads.

    Attributes:
        directory: folder of its own, which is created for its owner alone.
        lifetime: seconds for which a share is kept.
        limit: bytes of all images together.
    """

    directory: Path
    lifetime: float = 7 * 24 * 3600.0
    limit: int = 1 << 30
    _threads: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path, now: float) -> ShareStore:
        """Return the store of a folder, without what expired while no server ran.

        Raises:
            SettingsError: the folder cannot be made or written.
        """
        store = cls(directory=directory)
        try:
            store.expire(now)
        except OSError as error:
            raise SettingsError(
                f"cannot keep shared images in {directory}: {error.strerror or error}; give "
                "--no-shares, or set LATENTFORGE_CACHE to another folder"
            ) from error
        return store

    def add(self, png: bytes, caption: Caption, now: float) -> SharedImage:
        """Keep an image and return a new share of it.

        Args:
            png: the file.
            caption: text to show with it.
            now: seconds since 1970.

        Raises:
            ShareFullError: there is no room until older images expire.
            TargetError: the files cannot be written.
        """
        image = SharedImage(
            id=secrets.token_hex(16),
            digest=hashlib.sha256(png).hexdigest(),
            caption=caption,
            created=now,
            expires=now + self.lifetime,
        )
        files = {
            self.directory / f"{image.digest}.png": png,
            self.directory / f"{image.id}.json": msgspec.json.encode(image),
        }
        with self._alone():
            self._expire(now)
            missing = {path: content for path, content in files.items() if not path.exists()}
            self._check_room(sum(map(len, missing.values())), now)
            for path, content in missing.items():
                with staged_file(path) as partial:
                    partial.write_bytes(content)
            for path in files:
                os.utime(path, (now, image.expires))
        return image

    def get(self, identifier: str, now: float) -> SharedImage | None:
        """Return the share of that name, or None if there is none or it has expired."""
        if not _IDENTIFIER.fullmatch(identifier):
            return None
        with suppress(OSError, msgspec.MsgspecError):
            record = read_file(self.directory / f"{identifier}.json", _MAX_RECORD)
            image = msgspec.json.decode(record, type=SharedImage)
            return image if image.id == identifier and now < image.expires else None
        return None

    def content(self, image: SharedImage) -> bytes | None:
        """Return the PNG file of a share; None if it was deleted or damaged."""
        with suppress(OSError):
            content = read_file(self.directory / f"{image.digest}.png", self.limit)
            return content if hashlib.sha256(content).hexdigest() == image.digest else None
        return None

    def expire(self, now: float) -> None:
        """Delete what has expired."""
        with self._alone():
            self._expire(now)

    def _expire(self, now: float) -> None:
        for entry in self._entries():
            with suppress(OSError):  # another server's: it is gone
                if entry.stat().st_mtime <= now:
                    os.unlink(entry)

    def _check_room(self, size: int, now: float) -> None:
        entries = [entry.stat() for entry in self._entries()]
        if sum(entry.st_size for entry in entries) + size > self.limit:
            first = min((entry.st_mtime for entry in entries), default=now)
            left = max(1.0, first - now)
            raise ShareFullError(
                f"the shared images fill their {size_text(self.limit)}: the next one expires in "
                f"{left:.0f} s; download the image instead, or try again then",
                retry_after=left,
            )

    def _entries(self) -> list[os.DirEntry[str]]:
        with os.scandir(self.directory) as entries:
            return [entry for entry in entries if entry.name.endswith((".png", ".json"))]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads and other servers out for the block."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._threads, open(self.directory / _LOCK, "wb") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
