"""Pictures with captions to train on: a folder, or shards in WebDataset's layout.

Shards are read without the webdataset library: it unpickles members by their names, and its stream
of shuffled samples has no position to go on from. An uncompressed tar gives every member by its
offset, so that a sample is a number, and a training goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import open_regular, read_file
from latentforge.runtime.image import decode_image
from latentforge.runtime.text import one_line, printable

__all__ = ["CaptionedPicture", "CaptionedPictures", "FileSpan"]

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_CAPTIONS = (".txt", ".caption", ".json")  # of a picture in a shard, in the order of preference
_TEXT_KEYS = ("text", "caption", "prompt")
_METADATA = "metadata.jsonl"
_MAX_PICTURE, _MAX_CAPTION, _MAX_LIST = 256 << 20, 1 << 20, 1 << 30
_MAX_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, kw_only=True)
class FileSpan:
    """Bytes of a file: all, or those of a member of a tar.

    Attributes:
        path: of the file.
        start: of the first byte.
        size: number of bytes; None to the end.
    """

    path: Path
    start: int = 0
    size: int | None = None

    def read(self, limit: int) -> bytes:
        """Return the bytes.

        Raises:
            OSError: the file is missing, or they are more than the limit.
        """
        if self.size is None:
            return read_file(self.path, limit)
        if self.size > limit:
            raise OSError(f"{self.size} bytes, and {limit} are allowed")
        with open_regular(self.path) as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True, kw_only=True)
class CaptionedPicture:
    """Picture with a caption, neither of which is read before it is needed.

    Attributes:
        name: in messages.
        picture: bytes of its file.
        text: the caption, or the file that has it.
    """

    name: str
    picture: FileSpan
    text: str | FileSpan

    def image(self) -> Image.Image:
        """Return the picture.

        Raises:
            SettingsError: it is damaged, or implausibly large.
        """
        return decode_image(_content(self.name, self.picture, _MAX_PICTURE), self.name)

    def caption(self) -> str:
        """Return the caption on one line.

        Raises:
            SettingsError: it is empty, or not UTF-8 text.
        """
        text = self.text if isinstance(self.text, str) else _text(self.name, self.text)
        if not (caption := " ".join(text.split())):
            raise SettingsError(f"{self.name} has an empty caption: write one, or remove it")
        return caption


class CaptionedPictures:
    """Pictures in epochs, each in another order: shards are shuffled, and pictures within them.

    A picture is a position from the start of the training on, which alone, with the seed, says
    which one it is.
    """

    def __init__(self, shards: Sequence[_Shard], seed: int) -> None:
        self._shards, self._seed = tuple(shards), seed
        self._counts = np.array([shard.count for shard in shards])
        self._epoch = _ShardOrder.of(self._counts, seed, 0)

    @classmethod
    def open(cls, place: str, seed: int = 0) -> CaptionedPictures:
        """Open pictures with captions.

        Args:
            place: a folder of pictures, each with a .txt beside it or a line in metadata.jsonl
                ({"file_name": ..., "text": ...}); or shards: a .tar, a folder of them, a pattern
                such as ``data/{000..127}.tar``, or a text file with a shard on each line.
            seed: of the order.

        Raises:
            SettingsError: there is nothing to read, or pictures without captions.
        """
        path = Path(place)
        if path.is_dir() and not any(path.glob("*.tar")):
            pictures = tuple(_folder_pictures(path))
            shards = [_Shard(path=path, count=len(pictures), pictures=pictures)]
            missing = [row.name for row in pictures if row.text == ""]
        else:
            shards, missing = _open_shards(_shard_paths(place))
        _check(place, sum(shard.count for shard in shards), missing)
        return cls(shards, seed)

    def __len__(self) -> int:
        """Return the number of pictures in an epoch."""
        return int(self._counts.sum())

    def take(self, start: int, count: int) -> list[CaptionedPicture]:
        """Return the pictures at ``count`` positions from ``start`` on, through all epochs."""
        return [self[position] for position in range(start, start + count)]

    def __getitem__(self, position: int) -> CaptionedPicture:
        """Return the picture at a position of any epoch."""
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch.number:
            self._epoch = _ShardOrder.of(self._counts, self._seed, epoch)
        shard, place = self._epoch.find(index)
        order = _permutation(int(self._counts[shard]), self._seed, epoch, shard)
        return self._shards[shard].entries()[order[place]]


@dataclass(frozen=True, kw_only=True)
class _ShardOrder:
    """Order of the shards in an epoch, and the positions at which each ends."""

    number: int
    shards: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, counts: NDArray[np.int64], seed: int, epoch: int) -> _ShardOrder:
        shards = np.random.default_rng((seed, epoch)).permutation(len(counts))
        return cls(number=epoch, shards=shards, ends=counts[shards].cumsum())

    def find(self, index: int) -> tuple[int, int]:
        """Return the shard of a position within the epoch, and the place within the shard."""
        place = int(self.ends.searchsorted(index, side="right"))
        first = int(self.ends[place - 1]) if place else 0
        return int(self.shards[place]), index - first


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int, shard: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch, shard + 1)).permutation(count)


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """Tar of pictures, or a folder of them, which is a single shard.

    Attributes:
        path: of the tar.
        count: number of pictures.
        pictures: those of a folder; of a tar they are listed when they are needed.
    """

    path: Path
    count: int
    pictures: tuple[CaptionedPicture, ...] = ()

    def entries(self) -> tuple[CaptionedPicture, ...]:
        """Return the pictures in the order of the file.

        Raises:
            SettingsError: a tar has changed since it was opened.
        """
        entries = self.pictures or _tar_pictures(self.path)
        if len(entries) != self.count:
            raise SettingsError(f"{self.path} has changed since the training began: start again")
        return entries


def _check(place: str, count: int, missing: Sequence[str]) -> None:
    if not count:
        kinds = ", ".join(sorted(_PICTURES))
        raise SettingsError(f"{place} has no pictures: expected files of {kinds}, or .tar shards")
    if missing:
        raise SettingsError(
            f"{len(missing)} of {count} pictures in {place} have no caption, the first of them "
            f"{missing[0]}: write it into a .txt of the same name, or remove the picture"
        )


# folders


def _folder_pictures(folder: Path) -> Iterator[CaptionedPicture]:
    """Yield the pictures of a folder and its folders, by name; without a caption the text is ""."""
    texts = _metadata(folder)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _PICTURES or not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        text: str | FileSpan = texts.pop(name, "")
        beside = path.with_suffix(".txt")
        if not text and beside.is_file() and beside.stat().st_size:
            text = FileSpan(path=beside)
        yield CaptionedPicture(name=name, picture=FileSpan(path=path), text=text)
    if texts:
        raise SettingsError(f"{folder / _METADATA} names {next(iter(texts))}, which is not there")


def _metadata(folder: Path) -> dict[str, str]:
    """Return captions by file name of a metadata.jsonl, if there is one."""
    path = folder / _METADATA
    if not path.is_file():
        return {}
    texts: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            texts[str(row["file_name"])] = _caption_of(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SettingsError(
                f'{path}, line {number}: expected {{"file_name": ..., "text": ...}}, '
                f"not {line[:60]!r}"
            ) from error
    return texts


def _caption_of(row: Mapping[str, Any]) -> str:
    """Return the text of a record; "" if it has none."""
    texts = (row[key] for key in _TEXT_KEYS if isinstance(row.get(key), str))
    return next(texts, "").strip()


# shards


def _shard_paths(place: str) -> list[Path]:
    """Return the tars that a folder, a pattern or a list names."""
    path = Path(place)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if match := _RANGE.search(place):
        return _numbered(place, match)
    if path.suffix.lower() == ".tar":
        return [path]
    rows = [line.strip() for line in _lines(path) if line.strip()]
    return [path.parent / row for row in rows]


def _numbered(place: str, match: re.Match[str]) -> list[Path]:
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    if not 0 <= last - first < _MAX_SHARDS:
        raise SettingsError(f"{place}: expected a range such as {{000..127}}, not {match[0]}")
    head, tail = place[: match.start()], place[match.end() :]
    return [Path(f"{head}{number:0{width}}{tail}") for number in range(first, last + 1)]


def _open_shards(paths: Sequence[Path]) -> tuple[list[_Shard], list[str]]:
    """Return shards that are not empty, and the names of pictures without captions."""
    shards, missing = [], []
    for path in paths:
        pictures = _tar_pictures(path)
        missing += [row.name for row in pictures if row.text == ""]
        if pictures:
            shards.append(_Shard(path=path, count=len(pictures)))
    return shards, missing


def _tar_pictures(path: Path) -> tuple[CaptionedPicture, ...]:
    """Return the pictures of a shard, as it is now."""
    try:
        status = path.stat()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    return _listed(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)
def _listed(path: Path, size: int, changed: int) -> tuple[CaptionedPicture, ...]:
    """Return the pictures of a tar; members of a sample have its name up to the first dot."""
    samples: dict[str, dict[str, FileSpan]] = {}
    for name, span in _members(path, size):
        folder, _, file = name.rpartition("/")
        key, _, suffix = file.partition(".")
        samples.setdefault(f"{folder}/{key}" if folder else key, {})[f".{suffix.lower()}"] = span
    return tuple(filter(None, (_sample(path, key, spans) for key, spans in samples.items())))


def _members(path: Path, end: int) -> list[tuple[str, FileSpan]]:
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            rows = [row for row in tar if row.isreg() and not row.issparse()]
            if any(row.offset_data + row.size > end for row in rows):
                raise tarfile.ReadError("it is truncated")
            return [
                (row.name, FileSpan(path=path, start=row.offset_data, size=row.size))
                for row in rows
            ]
    except (OSError, tarfile.TarError, ValueError) as error:
        reason = printable(one_line(getattr(error, "strerror", None) or error))
        raise SettingsError(f"cannot read {path} as an uncompressed tar: {reason}") from error


def _sample(path: Path, key: str, spans: Mapping[str, FileSpan]) -> CaptionedPicture | None:
    """Return the picture of a sample, if it has one; without a caption the text is ""."""
    picture = next((spans[suffix] for suffix in sorted(spans.keys() & _PICTURES)), None)
    if picture is None:
        return None
    name = f"{path.name}/{key}"
    found = next((suffix for suffix in _CAPTIONS if suffix in spans and spans[suffix].size), None)
    text: str | FileSpan = "" if found is None else spans[found]
    if found == ".json" and isinstance(text, FileSpan):
        text = _json_caption(name, text)
    return CaptionedPicture(name=name, picture=picture, text=text)


def _json_caption(name: str, span: FileSpan) -> str:
    try:
        return _caption_of(json.loads(_content(name, span, _MAX_CAPTION)))
    except (ValueError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{name}.json is not a JSON object with a caption") from error


# bytes


def _content(name: str, span: FileSpan, limit: int) -> bytes:
    try:
        return span.read(limit)
    except OSError as error:
        raise SettingsError(f"cannot read {name}: {error.strerror or error}") from error


def _text(name: str, span: FileSpan) -> str:
    try:
        return _content(name, span, _MAX_CAPTION).decode()
    except UnicodeDecodeError as error:
        raise SettingsError(f"the caption of {name} is not UTF-8 text") from error


def _lines(path: Path) -> list[str]:
    try:
        return read_file(path, _MAX_LIST).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(
            f"cannot read {path}: {reason}; name a folder of pictures, a .tar, or a list of them"
        ) from error
