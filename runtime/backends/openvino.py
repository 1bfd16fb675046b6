"""OpenVINO: the engine is its IR, a graph (.xml) and the weights that belong to it (.bin).

An engine of several shapes is compiled for each of them at load. Where a run takes milliseconds,
fixed sizes make it about 1.25 times as fast; where it takes seconds, they gain nothing. Each
compiled graph has its own copy of the weights, in the layout of its kernels, so that memory grows
by the size of the weights with every shape. Threads do not spin between runs.

Options:
    threads: of one run; 0 lets OpenVINO use every core, or LATENTFORGE_THREADS of them. One
        counts as two: with a single thread OpenVINO 2026.4 passes over errors in the shapes of a
        graph of free sizes and runs on, which was seen to crash.
    profile: record the time of each layer.
    device: CPU, GPU, NPU or AUTO, where OpenVINO finds one.
    hint: ``latency`` gives one run all threads; ``throughput`` lets several run side by side.
    precision: of the computation, f32 by default, or f16 or bf16. OpenVINO's own default depends
        on the processor, and so would the image. A processor that lacks it computes in f32, which
        a warning says.
    dynamic_quantization: let layers of 8-bit weights round their inputs to 8 bits, in groups of
        32. This is less exact and meant to be faster; OpenVINO's own default is on.
    cache: keep the compiled graphs, without weights, in a folder beside the engine. This halves
        the load time of a small engine and saves a second of a large one's. Off by default: a load
        writes nothing.
    compress: when compiling, store float32 weights in half precision.
"""

import functools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino.frontend import FrontEndManager

from latentforge.runtime import backends
from latentforge.runtime.backends import CACHE, NO_MEMORY, Options, Report, return_memory
from latentforge.runtime.backends.ov.ir_file import check_ir
from latentforge.runtime.backends.session import CheckedSession, LayerTime, Outputs, Run
from latentforge.runtime.backends.signature import Signature, check_signature
from latentforge.runtime.disk import naming_full_disk
from latentforge.runtime.errors import BackendError, DeviceError, LatentforgeError
from latentforge.runtime.files import hash_file
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.machine import default_threads
from latentforge.runtime.manifest import Component
from latentforge.runtime.memory_limit import limited_memory, load_memory
from latentforge.runtime.shapes import ANY, Shapes, bounding_range
from latentforge.runtime.tensor import DTYPES, Feeds, TensorSpec

__all__ = ["OPTIONS", "SUFFIX", "OpenVinoSession", "compile", "load"]

OPTIONS: dict[str, type] = {
    "threads": int,
    **dict.fromkeys(("profile", "dynamic_quantization", "cache", "compress"), bool),
    **dict.fromkeys(("device", "hint", "precision"), str),
}
SUFFIX = ".xml"

_ALLOWED = {"hint": ("latency", "throughput"), "precision": ("f32", "f16", "bf16")}
_DTYPES = {ov.Type(np.dtype(name)).get_type_name(): name for name in DTYPES}
"""Numpy's names of the library's types; it has more, such as bf16 and strings."""

_QUANTIZATION_GROUP = 32
_UNBOUNDED = 1 << 20  # larger sizes come from ANY: OpenVINO would allocate for such a bound

_log = escaping_logger(__name__)

_UNSUPPORTED = re.compile(r"No conversion rule found for operations: (.+)")
_NOISE = re.compile(
    r"Exception from |Check '.*' failed at |FrontEnd API failed with |Loading input"
)
_NO_MEMORY = re.compile(r"bad_alloc|cannot allocate memory|not enough memory", re.IGNORECASE)


class OpenVinoSession(CheckedSession):
    """Session of OpenVINO: one compiled graph for each of the component's shapes."""

    def __init__(self, path: Path, component: Component, options: Options) -> None:
        super().__init__(component)
        settings = _settings(options)
        self._on_cpu = options.get("device", "CPU") == "CPU"  # other devices map memory of theirs
        for file in (path, path.with_suffix(".bin")):
            if not file.is_file():  # the library would wait for a pipe, for example
                raise BackendError(f"openvino finds no file {file}: compile the engine again")
        try:
            check_ir(path, path.with_suffix(".bin"))
            needed = load_memory(component.size, len(component.shapes))
            with limited_memory(needed) if self._on_cpu else nullcontext():
                self._engine = _graphs(path, component, options, settings)
        except BackendError:
            raise
        except Exception as error:  # the library's errors share no base class
            raise BackendError(f"openvino refuses {path}: {_reason(error)}") from error
        self._recording = bool(options.get("profile"))
        requested = options.get("precision", "f32")
        for graph in self._engine if self._on_cpu else ():
            if (computed := graph.precision()) != requested:
                _warn_of_precision(requested, computed)

    def layers(self) -> list[LayerTime]:
        """Return the time of each layer: see Session.layers()."""
        recording, self._recording = self._recording, False
        graphs = self._engine if recording else None
        return [layer for graph in graphs or () for layer in graph.layers()]

    def close(self) -> None:
        """Free the engine: see Session.close()."""
        super().close()
        return_memory()

    def _run(self, run: Run) -> Outputs:
        graph: _Graph = run.engine[run.shape_index or 0]
        with self.limited(run) if self._on_cpu else nullcontext():
            return graph.run(run.feeds, self.component.outputs)

    def _reason(self, error: BaseException) -> str:
        return _reason(error)


def _graphs(
    path: Path, component: Component, options: Options, settings: Mapping[str, Any]
) -> "list[_Graph]":
    """Return the compiled graph for each of a component's shapes."""
    model = _read(path, "ir")
    _check_signature(model, component, path)
    return [
        _Graph(_compiled(_reshaped(model, component, shapes), path, options, settings))
        for shapes in (component.shapes or ({},))
    ]


class _Graph:
    """Compiled graph with a pool of inference requests, which grows with parallel runs."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._inputs = _indices(compiled.inputs)
        self._outputs = _indices(compiled.outputs)
        self._idle = [compiled.create_infer_request()]
        self._runs = 0
        self._lock = threading.Lock()

    def run(self, feeds: Feeds, names: Iterable[str]) -> Outputs:
        inputs = {self._inputs[name]: array for name, array in feeds.items()}
        with self._request() as request:
            # Inputs are copied, which costs next to nothing: a graph of free sizes that first got
            # copies and then shared arrays was seen to read shared arrays after they were freed.
            values = request.infer(inputs).to_tuple()
        with self._lock:
            self._runs += 1
        return {name: values[self._outputs[name]] for name in names}

    def precision(self) -> str:
        """Return the precision that OpenVINO computes in, by its own name."""
        return str(self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def layers(self) -> list[LayerTime]:
        """Return layer times; OpenVINO reports means over all runs, the same for every request."""
        with self._lock:
            runs = self._runs
        with self._request() as request:
            profile = request.get_profiling_info()
        return [
            LayerTime(layer.node_name, layer.node_type, layer.real_time.total_seconds() * runs)
            for layer in profile
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
def _warn_of_precision(requested: str, computed: str) -> None:
    """Warn once that engines compute in another precision than they were compiled for."""
    _log.warning("openvino computes in %s here: this processor lacks %s", computed, requested)


@functools.cache
def _core() -> Any:
    return ov.Core()


def _read(path: Path, framework: str) -> Any:
    """Read a graph with one frontend; the library on its own would try every frontend in turn."""
    reader = FrontEndManager().load_by_framework(framework)
    return reader.convert(reader.load(str(path)))


def _settings(options: Options) -> dict[str, Any]:
    """Return the options as OpenVINO's properties, without those that the device lacks."""
    backends.check_options(options, OPTIONS, _ALLOWED)
    device = _device(options)
    group = _QUANTIZATION_GROUP if options.get("dynamic_quantization") else 0
    settings = {
        "INFERENCE_NUM_THREADS": _threads(options),
        "PERF_COUNT": options.get("profile", False),
        "PERFORMANCE_HINT": options.get("hint", "latency").upper(),
        "INFERENCE_PRECISION_HINT": options.get("precision", "f32"),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }
    if device == "AUTO":  # which passes the others on to the device that it selects
        return settings
    supported = _core().get_property(device, "SUPPORTED_PROPERTIES")
    return {key: value for key, value in settings.items() if key in supported}


def _threads(options: Options) -> int:
    """Return the threads of a run, 0 for the library's default; never one: see above."""
    threads: int = options.get("threads", 0) or default_threads()
    return 2 if threads == 1 else threads


def _device(options: Options) -> str:
    device: str = options.get("device", "CPU")
    here = _core().available_devices  # GPU.0 and GPU.1 where there are two
    if device not in {"AUTO", *here, *(name.partition(".")[0] for name in here)}:
        names = ", ".join(["AUTO", *here])
        raise DeviceError(f"openvino finds no device {device!r} here; available devices: {names}")
    return device


def _check_signature(model: Any, component: Component, path: Path) -> None:
    """Raise BackendError unless a graph has the inputs and outputs that its component describes."""
    inputs = _signature(model.inputs, component.inputs)
    outputs = _signature(model.outputs, component.outputs)
    check_signature(f"{path}: input", component.inputs, inputs)
    check_signature(f"{path}: output", component.outputs, outputs, further=True)


def _signature(ports: Sequence[Any], specs: Mapping[str, TensorSpec]) -> Signature:
    """Return dtypes and shapes by name; of several names of a tensor, that in the specs."""
    signature = {}
    for port in ports:
        name = min(port.names & specs.keys() or port.names)
        dtype, shape = port.element_type.get_type_name(), port.partial_shape
        sizes = None if shape.rank.is_dynamic else tuple(map(_size, shape))
        signature[name] = _DTYPES.get(dtype, dtype), sizes
    return signature


def _size(dimension: Any) -> int:
    return int(dimension.get_length()) if dimension.is_static else -1


def _indices(ports: Sequence[Any]) -> dict[str, int]:
    """Return the position of each name; a tensor may have several names."""
    return {name: index for index, port in enumerate(ports) for name in port.names}


def _reshaped(model: Any, component: Component, shapes: Shapes) -> Any:
    """Return the graph itself, its inputs changed to the sizes and bounds of these shapes."""
    indices = _indices(model.inputs)
    free = {name: shapes.get(name, ANY) for name in component.free_dimensions}
    model.reshape({indices[name]: _bounds(spec, free) for name, spec in component.inputs.items()})
    return model


def _bounds(spec: TensorSpec, free: Shapes) -> Any:
    lower = spec.resolve({name: allowed.min for name, allowed in free.items()})
    upper = spec.resolve({name: allowed.max for name, allowed in free.items()})
    bounds = zip(lower, upper, strict=True)
    return ov.PartialShape([ov.Dimension(a, b if b < _UNBOUNDED else -1) for a, b in bounds])


def _compiled(model: Any, path: Path, options: Options, settings: Mapping[str, Any]) -> Any:
    device = options.get("device", "CPU")
    if options.get("cache"):
        with suppress(Exception):  # a failing cache must not fail the load
            return _cached(model, path, device, settings)
    return _core().compile_model(model, device, settings)


def _cached(model: Any, path: Path, device: str, settings: Mapping[str, Any]) -> Any:
    """Compile with a cache folder, after deleting files in it whose hashes are wrong.

    OpenVINO looks files up by the graph, the settings and its own version, but does not notice
    damage.
    """
    folder = path.with_suffix(CACHE)
    folder.mkdir(exist_ok=True)
    for blob in folder.glob("*.blob"):
        digest = blob.with_suffix(".sha256")
        if not digest.is_file() or digest.read_text() != hash_file(blob):
            blob.unlink()
            digest.unlink(missing_ok=True)
    cache = {
        "CACHE_DIR": str(folder),
        "CACHE_MODE": "OPTIMIZE_SIZE",  # without the weights, which are read from the engine
        "WEIGHTS_PATH": str(path.with_suffix(".bin")),
    }
    compiled = _core().compile_model(model, device, {**settings, **cache})
    for blob in folder.glob("*.blob"):
        if not (digest := blob.with_suffix(".sha256")).is_file():
            digest.write_text(hash_file(blob))
    return compiled


def _reason(error: BaseException) -> str:
    """Return the library's message on one line, without locations in its sources."""
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return NO_MEMORY
    if unsupported := _UNSUPPORTED.search(text):
        return (
            f"it does not support the operators {unsupported[1].strip()}: optimize the exported "
            "engines with --target openvino"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if not _NOISE.match(line)]
    return " ".join(reasons or lines) or type(error).__name__


def compile(
    onnx: Path, target: Path, component: Component, options: Options, report: Report
) -> Mapping[str, str]:
    """Convert an ONNX file to OpenVINO's IR: target, and its weights in a .bin beside it.

    Weights keep their precision, half or 8 bits too. Sizes that the component fixes become fixed in
    the graph, and ranges become its bounds. See Backend.compile().
    """
    backends.check_options(options, OPTIONS, _ALLOWED)
    try:
        report("reading the graph", 0, 3)
        with limited_memory(load_memory(component.size)):
            _convert(onnx, target, component, options, report)
        report("writing the engine", 3, 3)
    except BaseException as error:
        for file in (target, target.with_suffix(".bin")):
            file.unlink(missing_ok=True)
        if isinstance(error, LatentforgeError) or not isinstance(error, Exception):
            raise
        raise BackendError(f"openvino refuses {onnx}: {_reason(error)}") from error
    return {}


def _convert(
    onnx: Path, target: Path, component: Component, options: Options, report: Report
) -> None:
    model = _read(onnx, "onnx")
    _check_signature(model, component, onnx)
    report("setting the sizes", 1, 3)
    model = _reshaped(model, component, bounding_range(component.shapes))
    _check_signature(model, component, onnx)
    report("writing the engine", 2, 3)
    with naming_full_disk(target, target.parent):
        ov.save_model(model, str(target), compress_to_fp16=options.get("compress", False))
        _read(target, "ir")  # the library does not report a full disk


def load(path: Path, component: Component, options: Options) -> OpenVinoSession:
    """Load an IR; its weights are memory-mapped from the .bin beside it, and no other file is read.

    Raises:
        BackendError: a file is missing or refused, or is not the engine of the component.
        DeviceError: OpenVINO does not find the device in the options.
    """
    return OpenVinoSession(path, component, options)
