"""Recorded runs of an engine directory: images, and inputs and outputs of calls of its engines.

A recording is a folder, so that its arrays need no memory until they are used, and can be kept for
later runs (references.py):

    index            sha256 of the rest on the first line, then an Index as JSON
    SHA256.npy       array of this content; equal arrays are one file
"""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.backends import LayerTime, Session
from latentforge.runtime.errors import LatentforgeError
from latentforge.runtime.files import hash_file
from latentforge.runtime.image import to_array
from latentforge.runtime.loader import load
from latentforge.runtime.pipeline import Pipeline, Result
from latentforge.runtime.progress import Progress
from latentforge.runtime.record import Record
from latentforge.runtime.settings import Settings
from latentforge.runtime.tensor import Feeds

__all__ = [
    "COMPARED_CALLS",
    "Call",
    "CallRecording",
    "RecordedImage",
    "RecordingRequest",
    "read_recording",
    "record",
    "sample_evenly",
]

COMPARED_CALLS = 4
"""Recorded calls of each component that the gate compares, spread over its run."""

T = TypeVar("T")

Array = NDArray[np.generic]
Outputs = Mapping[str, Array]

_INDEX = "index"
_MAPPED = 1 << 16  # bytes from which an array is mapped into memory instead of read


@dataclass(frozen=True)
class Call:
    """Inputs and outputs of one engine call."""

    feeds: Feeds
    outputs: Outputs


@dataclass(frozen=True, kw_only=True)
class RecordedImage:
    """Images of one prompt, the latents (images, channels, h, w), and the complete settings."""

    settings: Settings
    images: list[Image.Image]
    latents: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class CallRecording:
    """Images of a few prompts, and calls of engines.

    Attributes:
        results: one per prompt.
        calls: in order, by component.
    """

    results: tuple[RecordedImage, ...]
    calls: Mapping[str, tuple[Call, ...]]

    def feeds(self, name: str) -> list[Feeds]:
        """Return the inputs of a component, in order."""
        return [call.feeds for call in self.calls.get(name, ())]


class RecordingRequest(Record, frozen=True, kw_only=True):
    """Runs to record: one image per prompt, with its index as the seed.

    Attributes:
        prompts: one per image.
        settings: of the runs, such as steps and sampler, where they differ from the defaults.
        calls: number of calls to keep of each component, evenly spaced over all.
        components: components whose calls are kept; all if empty.
    """

    prompts: tuple[str, ...]
    settings: Mapping[str, Any] = {}
    calls: int = COMPARED_CALLS
    components: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        """Return True if calls of a component are kept."""
        return not self.components or name in self.components


class _StoredCall(Record, frozen=True, kw_only=True):
    """Call with the digests of its arrays."""

    feeds: Mapping[str, str]
    outputs: Mapping[str, str]


class _StoredImage(Record, frozen=True, kw_only=True):
    """Recorded image with the digests of its arrays."""

    settings: Mapping[str, Any]
    images: tuple[str, ...]
    latents: str


class _Index(Record, frozen=True, kw_only=True):
    """Content of a recording."""

    results: tuple[_StoredImage, ...]
    calls: Mapping[str, tuple[_StoredCall, ...]]

    @property
    def digests(self) -> set[str]:
        """Digests of all arrays."""
        calls = [call for calls in self.calls.values() for call in calls]
        arrays = {d for call in calls for part in (call.feeds, call.outputs) for d in part.values()}
        return arrays.union(*({*each.images, each.latents} for each in self.results))


class _ArrayFolder:
    """Arrays in a folder, by the sha256 of their files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, array: Array) -> str:
        content = io.BytesIO()
        np.save(content, np.asarray(array), allow_pickle=False)
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        if not (path := self._path(digest)).exists():
            path.write_bytes(content.getbuffer())
        return digest

    def get(self, digest: str) -> Array:
        path = self._path(digest)
        mapped = path.stat().st_size >= _MAPPED
        array: Array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        return array

    def check(self, digest: str) -> None:
        """Check a file's content; if it is another one, raise ValueError."""
        if len(digest) != 64 or not digest.isalnum() or hash_file(self._path(digest)) != digest:
            raise ValueError(f"{digest} is damaged")

    def keep(self, digests: Iterable[str]) -> None:
        """Delete all other arrays."""
        kept = {self._path(digest) for digest in digests}
        for path in self._folder.glob("*.npy"):
            if path not in kept:
                path.unlink()

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.npy"


class _Recorder:
    """Session that records its calls."""

    def __init__(self, session: Session, arrays: _ArrayFolder) -> None:
        self.calls: list[_StoredCall] = []
        self._session = session
        self._arrays = arrays

    def run(self, feeds: Feeds) -> dict[str, Array]:
        outputs = self._session.run(feeds)
        stored = ({k: self._arrays.add(a) for k, a in part.items()} for part in (feeds, outputs))
        self.calls.append(_StoredCall(feeds=next(stored), outputs=next(stored)))
        return outputs

    def layers(self) -> list[LayerTime]:
        return self._session.layers()

    def close(self) -> None:
        self._session.close()


def record(
    directory: Path, request: RecordingRequest, folder: Path, progress: Progress, activity: str
) -> CallRecording:
    """Generate images and record calls of engines.

    Args:
        directory: the engines.
        request: prompts and settings, and the calls to keep.
        folder: empty, for the recording's files.
        progress: counts one part per prompt.
        activity: name of the runs, for the progress.
    """
    arrays, recorders = _ArrayFolder(folder), dict[str, _Recorder]()

    def wrap(name: str, session: Session) -> Session:
        if not request.keeps(name):
            return session
        recorders[name] = _Recorder(session, arrays)
        return recorders[name]

    with load(directory, hashes=False, wrap_session=wrap, example_images=True) as pipeline:
        results = []
        for seed, prompt in enumerate(request.prompts):
            with progress.part(f"{activity}: {prompt[:32]}"):
                settings = pipeline.settings(prompt, **{"seed": seed, **request.settings})
                results.append(pipeline.run(settings, report=progress.step))
        if "vae_encoder" in pipeline.manifest.components and request.keeps("vae_encoder"):
            _encode_image(pipeline, recorders, results[0])
    index = _Index(
        results=tuple(_stored(result, arrays) for result in results),
        calls={n: tuple(sample_evenly(r.calls, request.calls)) for n, r in recorders.items()},
    )
    arrays.keep(index.digests)
    _write_index(folder, index)
    return read_recording(folder)


def _encode_image(pipeline: Pipeline, recorders: Mapping[str, _Recorder], result: Result) -> None:
    """Encode a generated image, if no run has encoded one: text to image never does."""
    encoder = pipeline.load_engine("vae_encoder")
    if not recorders["vae_encoder"].calls:
        encoder.run({"sample": to_array(result.images)})


def _stored(result: Result, arrays: _ArrayFolder) -> _StoredImage:
    return _StoredImage(
        settings=msgspec.to_builtins(result.settings),
        images=tuple(arrays.add(np.asarray(image)) for image in result.images),
        latents=arrays.add(result.latents),
    )


def _write_index(folder: Path, index: _Index) -> None:
    body = msgspec.json.encode(index)
    digest = hashlib.sha256(body).hexdigest().encode()
    (folder / _INDEX).write_bytes(digest + b"\n" + body)


def read_recording(folder: Path, *, check: bool = False) -> CallRecording:
    """Read a recording, whose larger arrays are mapped into memory.

    Args:
        folder: of record().
        check: compare every array with its hash.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """
    digest, _, body = (folder / _INDEX).read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{folder / _INDEX} is damaged")
    index, arrays = msgspec.json.decode(body, type=_Index), _ArrayFolder(folder)
    if check:
        for name in index.digests:
            arrays.check(name)
    return CallRecording(
        results=tuple(_image(stored, arrays) for stored in index.results),
        calls={
            name: tuple(Call(_arrays(c.feeds, arrays), _arrays(c.outputs, arrays)) for c in calls)
            for name, calls in index.calls.items()
        },
    )


def _image(stored: _StoredImage, arrays: _ArrayFolder) -> RecordedImage:
    try:
        settings = msgspec.convert(stored.settings, Settings)
    except LatentforgeError as error:  # of another version
        raise ValueError(str(error)) from error
    return RecordedImage(
        settings=settings,
        images=[Image.fromarray(np.asarray(arrays.get(digest))) for digest in stored.images],
        latents=np.asarray(arrays.get(stored.latents), np.float32),
    )


def _arrays(digests: Mapping[str, str], arrays: _ArrayFolder) -> dict[str, Array]:
    return {name: arrays.get(digest) for name, digest in digests.items()}


def sample_evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` items, evenly spaced over all of them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round()
    return [items[int(place)] for place in places]
