"""How a peer's program answers a benchmark; see measure/bench/protocol.py for the other end.

The programs beside this file run in their peer's environment, where latentforge isn't installed.
So this needs numpy and the standard library alone, and they import it as a neighbour.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["PeerJob", "Loaded", "Stages", "file_bytes", "serve", "timed", "versions"]

Stages = dict[str, list[float]]
"""Seconds of every call in one request, by stage."""

_MODEL = "model"
_SOURCE = "source.json"


@dataclass(frozen=True, kw_only=True)
class PeerJob:
    """What a participant is asked: the fields of a job's file.

    Attributes:
        model: a checkpoint in diffusers' layout.
        settings: the request, see runtime/settings.py.
        scheduler: a diffusers class (``name``), what to give its from_config beside the
            checkpoint's own (``options``), and maybe ``timesteps``.
        picture: the .npy file to leave the last picture in, (n, 3, height, width) in -1..1.
        noise: a .npy file of the noise to start from, (n, channels, h, w) of unit variance.
        folder: where to keep what the checkpoint was converted to.
    """

    model: Path
    settings: Mapping[str, Any]
    threads: int
    picture: Path
    noise: Path
    folder: Path
    scheduler: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "PeerJob":
        """Read a job's file."""
        given = json.loads(path.read_bytes())
        values = {field.name: given[field.name] for field in fields(cls)}
        places = ("model", "picture", "noise", "folder")
        return cls(**{**values, **{name: Path(values[name]) for name in places}})


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready.

    Attributes:
        paint: makes the request's pictures, (n, 3, height, width) in -1..1, and notes what the
            stages took.
        versions: of its libraries, by distribution.
        precision: what it computes in.
        bytes: of the files that it loads.
    """

    paint: Callable[[Stages], NDArray[np.float32]]
    versions: Mapping[str, str]
    precision: str
    bytes: int


Load = Callable[[PeerJob, Path], Loaded]
Convert = Callable[[Path, Path], None]


def serve(load: Load, convert: Convert | None = None) -> None:
    """Answer as a participant: load once, and make the request once for every line of input.

    ``load`` takes the job and the directory to load. ``convert`` makes that of a checkpoint, given
    both paths; without it the checkpoint is loaded as it is. It runs in a process of its own, so
    that the memory it takes isn't counted as the participant's.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all there is to load is on this machine
    out = _answers()
    try:
        if sys.argv[1] == "--convert":
            assert convert is not None
            convert(Path(sys.argv[2]), Path(sys.argv[3]))
        else:
            _serve(PeerJob.read(Path(sys.argv[1])), load, convert is not None, out)
    except ModuleNotFoundError as error:
        _tell(out, {"missing": f"{error.name} isn't installed in its environment"})
    except Exception as error:  # whatever it is, the other side wants it in a line
        _tell(out, {"error": " ".join(str(error).split()) or type(error).__name__})
        raise


def timed(function: Callable[..., Any], calls: Callable[[], list[float]]) -> Callable[..., Any]:
    """The function, noting the seconds of each call in the list that is current then."""

    @wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        calls().append(time.perf_counter() - start)
        return result

    return noted


def versions(*distributions: str) -> dict[str, str]:
    """The installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in distributions}


def file_bytes(directory: Path, *patterns: str) -> int:
    """What the files in a directory take that match any of the patterns."""
    files = {path for pattern in patterns for path in directory.glob(pattern)}
    return sum(path.stat().st_size for path in files)


def _answers() -> TextIO:
    """Standard output for answers alone: what libraries print, in whatever language, is moved."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def _tell(out: TextIO, message: Mapping[str, Any]) -> None:
    print(json.dumps(message), file=out, flush=True)


def _serve(job: PeerJob, load: Load, converts: bool, out: TextIO) -> None:
    directory = _converted(job, out) if converts else job.model
    if directory is None:
        return
    loaded = load(job, directory)
    ready = {key: getattr(loaded, key) for key in ("versions", "precision", "bytes")}
    _tell(out, {"ready": ready})
    for _ in sys.stdin:
        stages: Stages = {}
        start = time.perf_counter()
        picture = loaded.paint(stages)
        total = time.perf_counter() - start
        np.save(job.picture, picture)
        _tell(out, {"total": total, "stages": stages})


def _converted(job: PeerJob, out: TextIO) -> Path | None:
    """What the checkpoint was converted to, now if need be; None when that failed and was said."""
    source, target = json.dumps(_fingerprint(job.model)), job.folder / _MODEL
    note = target / _SOURCE
    if note.is_file() and note.read_text() == source:
        return target
    partial = job.folder / f"{_MODEL}.partial"
    for left in (partial, target):  # by a killed conversion, or of another checkpoint
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    start = time.perf_counter()
    command = [sys.executable, sys.argv[0], "--convert", str(job.model), str(partial)]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if ended.stdout or ended.returncode:
        why = {"error": f"its conversion of the checkpoint ended with status {ended.returncode}"}
        _tell(out, json.loads(ended.stdout) if ended.stdout else why)
        return None
    (partial / _SOURCE).write_text(source)
    partial.rename(target)
    _tell(out, {"prepared": time.perf_counter() - start})
    return target


def _fingerprint(checkpoint: Path) -> list[list[Any]]:
    """What tells this checkpoint from another: the names, sizes and times of its files."""
    files = sorted(path for path in checkpoint.resolve().rglob("*") if path.is_file())
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
