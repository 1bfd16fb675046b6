"""Recordings that are kept for later runs: recipes, targets and runs of one export share them.

They lie in ``references`` in the user's cache (cache_folder()), each under the hash of everything
that its images depend on. An entry appears complete or not at all; one that is damaged is recorded
again; and the oldest are deleted once all together exceed MAX_BYTES.
"""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from latentforge.optimize.recording import CallRecording, RecordingRequest, read_recording, record
from latentforge.runtime import backends
from latentforge.runtime.cache import cache_folder
from latentforge.runtime.cleanups import at_forced_end
from latentforge.runtime.machine import cpu_name
from latentforge.runtime.manifest import Manifest
from latentforge.runtime.progress import Progress
from latentforge.runtime.version import __version__

__all__ = ["MAX_BYTES", "recorded"]

MAX_BYTES = 2 << 30
"""Bytes of all kept recordings: about thirty of Stable Diffusion's."""

_PARTIAL = ".partial-"
_STALE_SECONDS = 24 * 3600  # age from which an incomplete entry is a killed process's


def recorded(
    directory: Path, request: RecordingRequest, folder: Path, progress: Progress, activity: str
) -> CallRecording:
    """Return a kept recording, or make one and keep it: see record().

    The cache never fails a run: a folder that cannot be read or written is none.
    """
    cache = cache_folder()
    kept = None if cache is None else cache / "references" / _key(directory, request)
    if kept is not None and (found := _recall(kept)) is not None:
        for prompt in request.prompts:
            with progress.part(f"{activity}: kept from an earlier run: {prompt[:32]}"):
                pass
        return found
    folder.mkdir()
    made = record(directory, request, folder, progress, activity)
    if kept is not None:
        with suppress(OSError):
            _keep(folder, kept)
    return made


def _key(directory: Path, request: RecordingRequest) -> str:
    """Return the hash of everything that the images depend on."""
    manifest = Manifest.read(directory, hashes=False)
    used = {component.backend for component in manifest.components.values()}
    versions = {name: backends.version(name) for name in sorted(used)}
    model = msgspec.structs.replace(manifest, history=(), quality={})
    parts = [__version__, cpu_name(), versions, model, request]
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


def _recall(kept: Path) -> CallRecording | None:
    """Return a kept recording; None if there is none, or a damaged one, which is deleted."""
    if not kept.is_dir():
        return None
    try:
        recording = read_recording(kept, check=True)
        os.utime(kept)  # the oldest are deleted first
    except (OSError, ValueError, EOFError):
        shutil.rmtree(kept, ignore_errors=True)
        return None
    return recording


def _keep(folder: Path, kept: Path) -> None:
    """Copy a recording into the cache, unless another process has been faster."""
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if _size(folder) > MAX_BYTES:
        return
    partial = kept.with_name(f"{_PARTIAL}{secrets.token_hex(8)}")
    try:
        with at_forced_end(lambda: shutil.rmtree(partial)):
            shutil.copytree(folder, partial)
            partial.rename(kept)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _evict(kept.parent)


def _evict(cache: Path) -> None:
    """Delete what killed processes left, and the oldest recordings above MAX_BYTES."""
    entries = sorted(_entries(cache), reverse=True)
    total = 0
    for modified, path in entries:
        if path.name.startswith(_PARTIAL):
            if time.time() - modified > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
            continue
        total += _size(path)
        if total > MAX_BYTES:
            shutil.rmtree(path, ignore_errors=True)


def _entries(cache: Path) -> Iterator[tuple[float, Path]]:
    for path in cache.iterdir():
        with suppress(OSError):  # another process has deleted it
            yield path.stat().st_mtime, path


def _size(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(OSError):
            total += path.stat().st_size
    return total
