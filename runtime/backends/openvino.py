"""OpenVINO: the engine is its IR, a graph (.xml) and the weights that belong to it (.bin).

An engine of several shapes is compiled for each of them at load: where a run takes milliseconds,
known sizes make it about 1.25 times as fast; where it takes seconds, they gain nothing. Each
compiled graph holds its own copy of the weights, in the order that its kernels want, so that memory
grows by the weights with every shape. Threads do not spin between runs.

Options:
    threads: of one run; 0 lets OpenVINO take every core.
    profile: record what each layer takes.
    device: CPU, GPU, NPU or AUTO, where OpenVINO finds one.
    hint: ``latency`` gives one run all threads; ``throughput`` lets several run side by side.
    precision: to compute in, f32 unless f16 or bf16 is asked for. OpenVINO's own choice depends on
        the processor, and so would the picture. A processor that lacks f16 computes in f32.
    dynamic_quantization: let layers of 8-bit weights round their inputs to 8 bits, in groups of
        32. That is less exact, and meant to be faster; OpenVINO would do it unasked.
    cache: keep the compiled graphs, without weights, in a folder beside the engine. That saves half
        of the load of a small engine, and a second of a large one's; a load writes nothing unasked.
    compress: when compiling, store float32 weights in half precision.
"""

import functools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino.frontend import FrontEndManager

from latentforge.runtime.backends import (
    CACHE,
    NO_MEMORY,
    LayerTime,
    Options,
    Report,
    check_options,
    return_memory,
)
from latentforge.runtime.errors import BackendError, DeviceError, SettingsError
from latentforge.runtime.files import hash_file
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import ANY, Shapes, bounding_range
from latentforge.runtime.tensor import Feeds, TensorSpec

__all__ = ["OPTIONS", "SUFFIX", "compile", "load"]

OPTIONS: dict[str, type] = {
    "threads": int,
    "profile": bool,
    "device": str,
    "hint": str,
    "precision": str,
    "dynamic_quantization": bool,
    "cache": bool,
    "compress": bool,
}
SUFFIX = ".xml"

_CHOICES = {"hint": ("latency", "throughput"), "precision": ("f32", "f16", "bf16")}
_MAX_THREADS = 256
_GROUP = 32
_UNBOUNDED = 1 << 20  # sizes from here on come of ANY: a bound so large would be allocated for

_UNKNOWN = re.compile(r"No conversion rule found for operations: (.+)")
_NOISE = re.compile(
    r"Exception from |Check '.*' failed at |FrontEnd API failed with |Loading input"
)
_NO_MEMORY = re.compile(r"bad_alloc|cannot allocate memory|not enough memory", re.IGNORECASE)


class OpenVinoSession:
    def __init__(self, path: Path, component: Component, options: Options) -> None:
        self.component = component
        settings = _settings(options)
        for file in (path, path.with_suffix(".bin")):
            if not file.is_file():  # a pipe, for one, would be waited for
                raise BackendError(f"openvino finds no file {file}: compile the engine again")
        try:
            model = _read(path, "ir")
            _check_signature(model, component, path)
            self._graphs: list[_Graph] | None = [
                _Graph(_compiled(_fitted(model, component, shapes), path, options, settings))
                for shapes in (component.shapes or ({},))
            ]
        except BackendError:
            raise
        except Exception as error:  # the library's errors share no base class of their own
            raise BackendError(f"openvino refuses {path}: {_reason(error)}") from error
        self._recording = bool(options.get("profile"))

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        graphs = self._graphs  # another thread may close it meanwhile
        if graphs is None:
            raise BackendError(f"{self.component.file} is closed")
        _, index = self.component.fit(feeds)
        try:
            return graphs[index or 0].run(feeds, self.component.outputs)
        except Exception as error:
            raise BackendError(f"{self.component.file} failed: {_reason(error)}") from error

    def layers(self) -> list[LayerTime]:
        recording, self._recording = self._recording, False
        graphs = self._graphs if recording else None
        return [layer for graph in graphs or () for layer in graph.layers()]

    def close(self) -> None:
        self._graphs = None
        return_memory()


class _Graph:
    """One compiled graph, and as many requests as ever ran at once."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._inputs = _indices(compiled.inputs)
        self._outputs = _indices(compiled.outputs)
        self._idle = [compiled.create_infer_request()]
        self._runs = 0
        self._lock = threading.Lock()

    def run(self, feeds: Feeds, names: Iterable[str]) -> dict[str, NDArray[np.generic]]:
        given = {self._inputs[name]: array for name, array in feeds.items()}
        with self._request() as request:
            # Inputs are copied, which costs next to nothing: a graph of free sizes that was given
            # arrays in place, and copies before, was seen to reach for them when they were gone.
            values = request.infer(given).to_tuple()
        with self._lock:
            self._runs += 1
        return {name: values[self._outputs[name]] for name in names}

    def layers(self) -> list[LayerTime]:
        """OpenVINO gives the mean over all runs of a layer, whichever request is asked."""
        with self._lock:
            runs = self._runs
        with self._request() as request:
            seen = request.get_profiling_info()
        return [
            LayerTime(layer.node_name, layer.node_type, layer.real_time.total_seconds() * runs)
            for layer in seen
            if layer.status == ov.ProfilingInfo.Status.EXECUTED
        ]

    @contextmanager
    def _request(self) -> Iterator[Any]:
        with self._lock:
            request = self._idle.pop() if self._idle else None
        request = request or self._compiled.create_infer_request()
        try:
            yield request
        finally:
            with self._lock:
                self._idle.append(request)


@functools.cache
def _core() -> Any:
    return ov.Core()


def _read(path: Path, framework: str) -> Any:
    """Read a graph by the named reader alone; the library would try all it has, in turn."""
    reader = FrontEndManager().load_by_framework(framework)
    return reader.convert(reader.load(str(path)))


def _check(options: Options) -> None:
    check_options(options, OPTIONS)
    if (threads := options.get("threads", 0)) > _MAX_THREADS:
        raise SettingsError(f"backend option threads is at most {_MAX_THREADS}, not {threads}")
    for key, choices in _CHOICES.items():
        if (value := options.get(key, choices[0])) not in choices:
            raise SettingsError(f"backend option {key} is {' or '.join(choices)}, not {value!r}")


def _settings(options: Options) -> dict[str, Any]:
    """The options in OpenVINO's words, as far as the device knows them."""
    _check(options)
    device = _device(options)
    settings = {
        "INFERENCE_NUM_THREADS": options.get("threads", 0),
        "PERF_COUNT": options.get("profile", False),
        "PERFORMANCE_HINT": options.get("hint", "latency").upper(),
        "INFERENCE_PRECISION_HINT": options.get("precision", "f32"),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP if options.get("dynamic_quantization") else 0,
    }
    if device == "AUTO":  # which hands on what is not its own
        return settings
    known = _core().get_property(device, "SUPPORTED_PROPERTIES")
    return {key: value for key, value in settings.items() if key in known}


def _device(options: Options) -> str:
    device: str = options.get("device", "CPU")
    here = _core().available_devices  # GPU.0 and GPU.1 where there are two
    if device not in {"AUTO", *here, *(name.partition(".")[0] for name in here)}:
        names = ", ".join(["AUTO", *here])
        raise DeviceError(f"openvino finds no device {device!r} here; there are {names}")
    return device


def _check_signature(model: Any, component: Component, path: Path) -> None:
    """Raise BackendError unless a graph takes and gives what its component says."""
    for kind, ports, specs in (
        ("input", model.inputs, component.inputs),
        ("output", model.outputs, component.outputs),
    ):
        indices = _indices(ports)
        for name, spec in specs.items():
            if name not in indices or not _agrees(ports[indices[name]], spec):
                found = f"has {_described(ports[indices[name]])}" if name in indices else "has none"
                raise BackendError(f"{path}: {kind} {name} is to be {spec}, and the graph {found}")
        if kind == "input" and len(ports) != len(specs):
            raise BackendError(f"{path}: the graph has {len(ports)} inputs, and not {len(specs)}")


def _indices(ports: Sequence[Any]) -> dict[str, int]:
    """Where each name stands; a tensor may have several."""
    return {name: index for index, port in enumerate(ports) for name in port.names}


def _agrees(port: Any, spec: TensorSpec) -> bool:
    shape = ov.PartialShape([size if isinstance(size, int) else -1 for size in spec.shape])
    same = port.element_type.to_dtype() == np.dtype(spec.dtype)
    return same and bool(port.partial_shape.compatible(shape))


def _described(port: Any) -> str:
    return f"{port.element_type.to_dtype()}{port.partial_shape}"


def _fitted(model: Any, component: Component, shapes: Shapes) -> Any:
    """The graph itself, its inputs now of the sizes and bounds that these shapes have."""
    indices = _indices(model.inputs)
    free = {name: shapes.get(name, ANY) for name in component.free_dimensions}
    model.reshape({indices[name]: _bounds(spec, free) for name, spec in component.inputs.items()})
    return model


def _bounds(spec: TensorSpec, free: Shapes) -> Any:
    least = spec.resolve({name: allowed.min for name, allowed in free.items()})
    most = spec.resolve({name: allowed.max for name, allowed in free.items()})
    sizes = zip(least, most, strict=True)
    return ov.PartialShape([ov.Dimension(a, b if b < _UNBOUNDED else -1) for a, b in sizes])


def _compiled(model: Any, path: Path, options: Options, settings: Mapping[str, Any]) -> Any:
    device = options.get("device", "CPU")
    if options.get("cache"):
        with suppress(Exception):  # no cache is worth a failure
            return _cached(model, path, device, settings)
    return _core().compile_model(model, device, settings)


def _cached(model: Any, path: Path, device: str, settings: Mapping[str, Any]) -> Any:
    """Compile by way of a folder, whose files are taken for what they are only if they are whole.

    OpenVINO finds them by the graph, the settings and its own version, but takes damaged ones.
    """
    folder = path.with_suffix(CACHE)
    folder.mkdir(exist_ok=True)
    for blob in folder.glob("*.blob"):
        if not _digest_file(blob).is_file() or _digest_file(blob).read_text() != hash_file(blob):
            blob.unlink()
            _digest_file(blob).unlink(missing_ok=True)
    where = {
        "CACHE_DIR": str(folder),
        "CACHE_MODE": "OPTIMIZE_SIZE",  # without the weights, which are taken from the engine
        "WEIGHTS_PATH": str(path.with_suffix(".bin")),
    }
    compiled = _core().compile_model(model, device, {**settings, **where})
    for blob in folder.glob("*.blob"):
        if not _digest_file(blob).is_file():
            _digest_file(blob).write_text(hash_file(blob))
    return compiled


def _digest_file(blob: Path) -> Path:
    return blob.with_suffix(".sha256")


def _reason(error: Exception) -> str:
    """What the library says, on one line, without the places in its sources."""
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return NO_MEMORY
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not _NOISE.match(line)]
    return " ".join(said or lines) or type(error).__name__


def compile(
    onnx: Path, target: Path, component: Component, options: Options, report: Report
) -> Mapping[str, str]:
    """Convert an ONNX file to OpenVINO's IR: target, and its weights in a .bin beside it.

    Weights stay as the graph has them, in half or in 8 bits. Sizes that the component fixes become
    fixed in the graph, and ranges become its bounds.
    """
    _check(options)
    try:
        report("reading the graph", 0, 3)
        model = _read(onnx, "onnx")
        _check_signature(model, component, onnx)
        report("setting the sizes", 1, 3)
        _check_signature(
            _fitted(model, component, bounding_range(component.shapes)), component, onnx
        )
        report("writing the engine", 2, 3)
        ov.save_model(model, str(target), compress_to_fp16=options.get("compress", False))
        _read(target, "ir")  # a disk that is full is no error to the library
        report("writing the engine", 3, 3)
    except BaseException as error:
        for file in (target, target.with_suffix(".bin")):
            file.unlink(missing_ok=True)
        if isinstance(error, BackendError) or not isinstance(error, Exception):
            raise
        raise _refusal(onnx, error) from error
    return {}


def _refusal(onnx: Path, error: Exception) -> BackendError:
    if unknown := _UNKNOWN.search(str(error)):
        return BackendError(
            f"{onnx}: openvino does not know {unknown[1].strip()}: optimize the exported engines "
            "with --target openvino"
        )
    return BackendError(f"openvino refuses {onnx}: {_reason(error)}")


def load(path: Path, component: Component, options: Options) -> OpenVinoSession:
    """Load an IR; its weights are mapped from the .bin beside it, and no other file is read."""
    return OpenVinoSession(path, component, options)
