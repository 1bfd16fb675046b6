"""Peer's side of a benchmark; measure/bench/protocol.py describes the messages.

The programs in this directory run in their peer's environment, without latentforge. This module
therefore needs only numpy and the standard library, and they import it as a sibling.
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

__all__ = ["LoadedModel", "PeerJob", "Stages", "file_bytes", "serve", "timed", "versions"]

Stages = dict[str, list[float]]
"""Seconds of each call within one request, by stage."""

_MODEL = "model"
_SOURCE = "source.json"


@dataclass(frozen=True, kw_only=True)
class PeerJob:
    """Work of a participant, as its job file describes it.

    Attributes:
        model: a checkpoint in diffusers' layout.
        settings: the request, see runtime/settings.py.
        picture: the .npy file for the images of the last request, (n, 3, height, width) in -1..1.
        noise: a .npy file with the initial noise, (n, channels, h, w) of unit variance.
        folder: for the files that the checkpoint is converted to.
        scheduler: a diffusers class (``name``), arguments for its from_config (``options``) and,
            for samplers that need them, ``timesteps``.
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
        """Read a job file."""
        content = json.loads(path.read_bytes())
        values = {field.name: content[field.name] for field in fields(cls)}
        paths = ("model", "picture", "noise", "folder")
        return cls(**{**values, **{name: Path(values[name]) for name in paths}})


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Model that is ready to run.

    Attributes:
        generate: runs the request and returns its images, (n, 3, height, width) in -1..1; it adds
            the seconds of its stages to its argument.
        versions: of its libraries, by distribution.
        precision: of its arithmetic.
        bytes: size of the files that it loads.
    """

    generate: Callable[[Stages], NDArray[np.float32]]
    versions: Mapping[str, str]
    precision: str
    bytes: int


Load = Callable[[PeerJob, Path], LoadedModel]
Convert = Callable[[Path, Path], None]


def serve(load: Load, convert: Convert | None = None) -> None:
    """Load a job's model, then run its request once per line of standard input.

    Args:
        load: from the job and the directory to load.
        convert: creates that directory (its second argument) from a checkpoint (its first); without
            it, the checkpoint itself is loaded. It runs in its own process, so that its memory does
            not count as the participant's.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are on this machine
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # not imported
    out = _protocol_stream()
    try:
        if sys.argv[1] == "--convert":
            assert convert is not None
            convert(Path(sys.argv[2]), Path(sys.argv[3]))
        else:
            _serve(PeerJob.read(Path(sys.argv[1])), load, convert is not None, out)
    except ModuleNotFoundError as error:
        _send(out, {"missing": f"{error.name} is not installed in its environment"})
    except Exception as error:  # the parent expects any failure as one line
        _send(out, {"error": " ".join(str(error).split()) or type(error).__name__})
        raise


def timed(function: Callable[..., Any], calls: Callable[[], list[float]]) -> Callable[..., Any]:
    """Wrap a function so that it appends the seconds of each call to the list ``calls()``."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        calls().append(time.perf_counter() - start)
        return result

    return wrapper


def versions(*distributions: str) -> dict[str, str]:
    """Return the installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in distributions}


def file_bytes(directory: Path, *patterns: str) -> int:
    """Return the total size of the files in a directory that match any of the patterns."""
    files = {path for pattern in patterns for path in directory.glob(pattern)}
    return sum(path.stat().st_size for path in files)


def _protocol_stream() -> TextIO:
    """Return standard output for messages alone: file descriptor 1 becomes standard error.

    Libraries print to it from Python and from native code.
    """
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def _send(out: TextIO, message: Mapping[str, Any]) -> None:
    print(json.dumps(message), file=out, flush=True)


def _serve(job: PeerJob, load: Load, converts: bool, out: TextIO) -> None:
    directory = _converted(job, out) if converts else job.model
    if directory is None:
        return
    model = load(job, directory)
    ready = {key: getattr(model, key) for key in ("versions", "precision", "bytes")}
    _send(out, {"ready": ready})
    for _ in sys.stdin:
        stages: Stages = {}
        start = time.perf_counter()
        images = model.generate(stages)
        total = time.perf_counter() - start
        np.save(job.picture, images)
        _send(out, {"total": total, "stages": stages})


def _converted(job: PeerJob, out: TextIO) -> Path | None:
    """Return the converted checkpoint, after converting it if necessary.

    None after a failure, whose message has been sent.
    """
    source, target = json.dumps(_fingerprint(job.model)), job.folder / _MODEL
    record = target / _SOURCE
    if record.is_file() and record.read_text() == source:
        return target
    partial = job.folder / f"{_MODEL}.partial"
    for stale in (partial, target):  # of a killed conversion, or of another checkpoint
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    start = time.perf_counter()
    program = [sys.executable, *sys.orig_argv[1:-1]]  # as this process, but without its job
    command = [*program, "--convert", str(job.model), str(partial)]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if ended.stdout or ended.returncode:
        error = {"error": f"the conversion of the checkpoint exited with status {ended.returncode}"}
        _send(out, json.loads(ended.stdout) if ended.stdout else error)
        return None
    (partial / _SOURCE).write_text(source)
    partial.rename(target)
    _send(out, {"prepared": time.perf_counter() - start})
    return target


def _fingerprint(checkpoint: Path) -> list[list[Any]]:
    """Return the names, sizes and modification times of a checkpoint's files."""
    files = sorted(path for path in checkpoint.resolve().rglob("*") if path.is_file())
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
