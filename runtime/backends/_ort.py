"""What the backends on ONNX Runtime have in common."""

import json
import mmap
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from latentforge.runtime.backends import LayerTime, Options
from latentforge.runtime.errors import BackendError, SettingsError
from latentforge.runtime.manifest import Component

__all__ = [
    "LOG_NOTHING",
    "Recording",
    "copy_graph",
    "fixed_sizes",
    "new_settings",
    "one_line",
    "open_session",
]

LOG_NOTHING = 4  # each error comes to us as an exception, and is said once

_MAX_THREADS = 256


class Recording:
    """What each layer of a session takes, which the library writes into a folder of our own.

    The folder is deleted when the recording is read, and has to be read for that.
    """

    def __init__(self, settings: ort.SessionOptions) -> None:
        self._folder: Path | None = Path(tempfile.mkdtemp(prefix="latentforge-profile-"))
        settings.enable_profiling = True
        settings.profile_file_prefix = str(self._folder / "events")

    def layers(self, session: ort.InferenceSession | None) -> list[LayerTime]:
        """End it and return what was recorded: nothing the second time, or without a session.

        Raises:
            BackendError: the library left no recording, or none that can be read.
        """
        folder, self._folder = self._folder, None
        if folder is None:
            return []
        try:
            events = json.loads(Path(session.end_profiling()).read_bytes()) if session else []
            return _layer_times(events)
        except (OSError, ValueError) as error:
            raise BackendError(f"cannot read what onnxruntime recorded: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _layer_times(events: list[dict[str, Any]]) -> list[LayerTime]:
    """Sum ONNX Runtime's kernel events, in microseconds, by node."""
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            seconds[name, event["args"]["op_name"]] += event["dur"] / 1e6
    return [LayerTime(name, operator, total) for (name, operator), total in seconds.items()]


def new_settings(options: Options) -> ort.SessionOptions:
    """Settings of a session that prints nothing, with the threads that were asked for."""
    if (threads := options.get("threads", 0)) > _MAX_THREADS:
        raise SettingsError(f"backend option threads is at most {_MAX_THREADS}, not {threads}")
    settings = ort.SessionOptions()
    settings.log_severity_level = LOG_NOTHING
    settings.intra_op_num_threads = threads
    return settings


def open_session(
    path: Path, settings: ort.SessionOptions, providers: Sequence[Any]
) -> ort.InferenceSession:
    """Load a graph, on these providers or not at all.

    Raises:
        BackendError: the library refuses it.
    """
    try:
        # without this, some errors are printed and others end in a session on the CPU
        return ort.InferenceSession(path, settings, providers=providers, enable_fallback=0)
    except Exception as error:  # the library's errors share no base class of their own
        raise BackendError(f"onnxruntime refuses {path}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def copy_graph(onnx: Path, target: Path, component: Component) -> None:
    """Copy a graph, and its external weights beside it under their own names."""
    shutil.copyfile(onnx, target)
    for entry in component.data:
        name = Path(entry.file).name
        shutil.copyfile(onnx.parent / name, target.parent / name)


def fixed_sizes(onnx: Path, component: Component) -> dict[str, int]:
    """The dimensions that are free in a graph, and numbers in the component made of it."""
    sizes: dict[str, int] = {}
    for name, shape in _input_shapes(onnx):
        spec = component.inputs.get(name)
        if spec is None or len(spec.shape) != len(shape):
            continue  # for the library to refuse, or the run
        pairs = zip(shape, spec.shape, strict=True)
        sizes |= {free: size for free, size in pairs if free and isinstance(size, int)}
    return sizes


# A graph is a protobuf message: numbered fields, of which some are messages again. The numbers are
# those of onnx.proto. Read like this, inputs cost no time however large the weights are, and need
# no kernels for the operators, as in a session they would.

_GRAPH, _INPUT, _NAME, _TYPE, _TENSOR, _SHAPE, _DIMENSION, _FREE = 7, 11, 1, 2, 1, 2, 1, 2
_VARINT, _EIGHT_BYTES, _LENGTH = 0, 1, 2

_Part = tuple[int, int]


def _input_shapes(onnx: Path) -> list[tuple[str, list[str]]]:
    """Each input of a graph: its dimensions' names, "" for numbers. Empty if it is no graph."""
    try:
        with onnx.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return [_input(data, part) for part in _inside(data, (0, len(data)), _GRAPH, _INPUT)]
    except (OSError, ValueError, IndexError):
        return []


def _input(data: mmap.mmap, part: _Part) -> tuple[str, list[str]]:
    dimensions = _inside(data, part, _TYPE, _TENSOR, _SHAPE, _DIMENSION)
    name = "".join(_text(data, found) for found in _inside(data, part, _NAME))
    free = ["".join(_text(data, p) for p in _inside(data, each, _FREE)) for each in dimensions]
    return name, free


def _text(data: mmap.mmap, part: _Part) -> str:
    return data[slice(*part)].decode()


def _inside(data: mmap.mmap, part: _Part, *path: int) -> list[_Part]:
    """Where the fields are that a path of numbers leads to."""
    parts = [part]
    for number in path:
        parts = [inner for outer in parts for key, inner in _fields(data, outer) if key == number]
    return parts


def _fields(data: mmap.mmap, part: _Part) -> Iterator[tuple[int, _Part]]:
    """The fields of a message that are messages, texts or bytes, by number."""
    at, end = part
    while at < end:
        key, at = _varint(data, at)
        if key & 7 == _LENGTH:
            size, at = _varint(data, at)
            yield key >> 3, (at, at + size)
            at += size
        elif key & 7 == _VARINT:
            _, at = _varint(data, at)
        else:
            at += 8 if key & 7 == _EIGHT_BYTES else 4


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not byte & 0x80:
            return value, at
