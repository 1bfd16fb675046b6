"""What the backends on ONNX Runtime have in common, and their session on a device."""

import contextlib
import itertools
import json
import mmap
import shutil
import tempfile
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from latentforge.runtime.backends import NO_MEMORY, LayerTime, Options
from latentforge.runtime.errors import BackendError, SettingsError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import Feeds
from latentforge.runtime.text import one_line

__all__ = [
    "LOG_NOTHING",
    "TURN",
    "DeviceSession",
    "Place",
    "LayerRecording",
    "copy_graph",
    "fixed_sizes",
    "new_settings",
    "error_message",
    "open_session",
]

LOG_NOTHING = 4  # each error comes to us as an exception, and is said once

TURN = threading.Lock()
"""Held by whoever uses a GPU: while a graph is recorded, no thread of the process may allocate."""

_MAX_THREADS = 256
_KEPT = 8  # sizes whose memory and graphs stay

_T = TypeVar("_T")


class LayerRecording:
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
        raise BackendError(f"onnxruntime refuses {path}: {error_message(error)}") from error


def error_message(error: Exception) -> str:
    """Return the message of one of the library's errors on one line."""
    text = one_line(error, limit=None)
    return NO_MEMORY if "bad_alloc" in text or "Failed to allocate memory" in text else text


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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where inputs and outputs lie: the CPU will do as well, for tests.

    Attributes:
        kind, index: of the device, as ONNX Runtime names it.
        memory: that of a provider which is a plugin, to be used instead.
    """

    kind: str = "cuda"
    index: int = 0
    memory: Any = None

    def allocate(self, shape: tuple[int, ...], dtype: str) -> ort.OrtValue:
        """A tensor with nothing in it."""
        make, size = ort.OrtValue.ortvalue_from_shape_and_type, list(shape)
        if self.memory is not None:
            return make(size, np.dtype(dtype), memory_info=self.memory)
        return make(size, np.dtype(dtype), self.kind, self.index)

    def upload(self, array: NDArray[np.generic], value: ort.OrtValue) -> None:
        """Fill a tensor of the same dtype and shape."""
        if self.memory is None:
            value.update_inplace(array)
            return
        whole = array if array.flags.c_contiguous else array.copy()
        ort.copy_tensors([ort.OrtValue.ortvalue_from_numpy(whole)], [value])


@dataclass(kw_only=True)
class _Buffers:
    """The inputs and outputs of one size, and what was uploaded last."""

    place: Place
    binding: ort.IOBinding
    inputs: Mapping[str, ort.OrtValue]
    settings: ort.RunOptions
    graph: int | None
    uploaded: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def fill(self, feeds: Feeds) -> None:
        for name, array in feeds.items():
            if self.uploaded.get(name) is array and not array.flags.writeable:
                continue
            self.uploaded.pop(name, None)
            self.place.upload(array, self.inputs[name])
            if not array.flags.writeable:
                self.uploaded[name] = array  # which also keeps another from taking its identity


class DeviceSession:
    """A loaded graph whose inputs and outputs stay on a device.

    Inputs lie at addresses that never change, as graphs demand. An input array that is read-only
    and the very same object as in the last run of that size was uploaded already, and is not
    uploaded again: whoever passes such an array does not change it.

    Runs happen one after the other, in a thread that belongs to the session: graphs, and what the
    libraries keep for them, belong to a thread.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        component: Component,
        place: Place,
        *,
        graphs: bool = False,
        record: LayerRecording | None = None,
    ) -> None:
        self.component = component
        self._session: ort.InferenceSession | None = session
        self._place = place
        self._record = record
        self._graphs = itertools.count(1) if graphs else None
        self._buffers: OrderedDict[Any, _Buffers] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="latentforge-gpu")

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        if self._session is None:
            raise self._closed()
        sizes, index = self.component.fit(feeds)
        try:
            return self._do(lambda: self._run(feeds, sizes, index))
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"{self.component.file} failed: {error_message(error)}") from error

    def layers(self) -> list[LayerTime]:
        if self._record is None or self._session is None:
            return []
        record = self._record
        return self._do(lambda: record.layers(self._session))

    def close(self) -> None:
        with contextlib.suppress(BackendError):
            self.layers()
            self._do(self._free)
        self._thread.shutdown()

    def _do(self, work: Callable[[], _T]) -> _T:
        try:
            future = self._thread.submit(work)
        except RuntimeError:  # the thread has ended
            raise self._closed() from None
        return future.result()

    def _run(
        self, feeds: Feeds, sizes: Mapping[str, int], index: int | None
    ) -> dict[str, NDArray[np.generic]]:
        session = self._session
        if session is None:
            raise self._closed()
        key = (index, *sizes.items())
        with TURN:
            # those of this size leave the table while they run: after a failure they stay away
            buffers = self._buffers.pop(key, None) or self._new_buffers(session, sizes, index)
            buffers.fill(feeds)
            session.run_with_iobinding(buffers.binding, buffers.settings)
            values = buffers.binding.copy_outputs_to_cpu()
            self._keep(session, key, buffers)
        return dict(zip(self.component.outputs, values, strict=True))

    def _keep(self, session: ort.InferenceSession, key: Any, buffers: _Buffers) -> None:
        """Keep what ran last; what lay idle longest makes room."""
        self._buffers[key] = buffers
        if len(self._buffers) > _KEPT:
            _, old = self._buffers.popitem(last=False)
            if old.graph is not None and hasattr(session, "release_captured_graph"):
                session.release_captured_graph(old.graph)

    def _new_buffers(
        self, session: ort.InferenceSession, sizes: Mapping[str, int], index: int | None
    ) -> _Buffers:
        specs, place = self.component, self._place
        binding = session.io_binding()
        inputs = {
            name: place.allocate(spec.resolve(sizes), spec.dtype)
            for name, spec in specs.inputs.items()
        }
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, spec in specs.outputs.items():
            value = place.allocate(spec.resolve(sizes), spec.dtype)
            binding.bind_ortvalue_output(name, value)
        graph = next(self._graphs) if self._graphs else None
        settings = _run_settings(graph, index if len(specs.shapes) > 1 else None)
        return _Buffers(place=place, binding=binding, inputs=inputs, settings=settings, graph=graph)

    def _free(self) -> None:
        with TURN:
            self._buffers.clear()
            self._session = None

    def _closed(self) -> BackendError:
        return BackendError(f"{self.component.file} is closed")


def _run_settings(graph: int | None, profile: int | None) -> ort.RunOptions:
    settings = ort.RunOptions()
    if graph is not None:
        settings.add_run_config_entry("gpu_graph_id", str(graph))
        settings.add_run_config_entry("cuda_graph_annotation_id", str(graph))  # as RTX names it
    if profile is not None:
        settings.add_run_config_entry("nv_profile_index", str(profile))
    return settings
