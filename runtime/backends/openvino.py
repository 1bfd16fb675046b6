"""OpenVINO: the engine is its IR, a graph (.xml) and the weights that belong to it (.bin).

An engine of several shapes is compiled for each of them at load, because kernels of known sizes are
faster. Each compiled graph holds its own copy of the weights, in the order that its kernels want:
memory grows by about the weights with every shape.

Options:
    threads: of one run; 0 lets OpenVINO take every core.
    profile: record what each layer takes.
    device: CPU, GPU, NPU or AUTO, where OpenVINO finds one.
    hint: ``latency`` gives one run all threads; ``throughput`` lets several run side by side.
    precision: to compute in, f32 unless f16 or bf16 is asked for. OpenVINO's own choice depends on
        the processor, and so would the picture. A device that lacks it computes in f32.
    dynamic_quantization: let layers of 8-bit weights round their inputs to 8 bits, in groups of
        32. That is faster and less exact; OpenVINO would do it unasked.
    cache: keep the compiled graphs, without weights, in a folder beside the engine: the next load
        takes less than half the time.
    compress: when compiling, store float32 weights in half precision.
"""

import ctypes
import functools
import hashlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino.frontend import FrontEndManager

from latentforge.runtime.backends import CACHE, LayerTime, Options, Report, check_options
from latentforge.runtime.errors import BackendError, DeviceError, SettingsError
from latentforge.runtime.manifest import Component
from latentforge.runtime.shapes import ANY, Range, Shapes
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
_DIGESTS = "sha256"

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
        _return_memory()


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
        request = self._take()
        try:
            # Inputs are copied, which costs next to nothing: a graph of free sizes that once saw
            # an array in place may look for it when it is gone.
            given = {self._inputs[name]: array for name, array in feeds.items()}
            values = request.infer(given).to_tuple()
        finally:
            self._idle.append(request)
        return {name: values[self._outputs[name]] for name in names}

    def _take(self) -> Any:
        with self._lock:
            self._runs += 1
            if self._idle:
                return self._idle.pop()
        return self._compiled.create_infer_request()

    def layers(self) -> list[LayerTime]:
        """OpenVINO gives the mean of a layer's runs, whichever request is asked."""
        with self._lock:
            runs = self._runs
        seen = self._compiled.create_infer_request().get_profiling_info() if runs else []
        return [
            LayerTime(layer.node_name, layer.node_type, layer.real_time.total_seconds() * runs)
            for layer in seen
            if layer.status.name == "EXECUTED"
        ]


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
    known = _core().get_property(device, "SUPPORTED_PROPERTIES")
    return {key: value for key, value in settings.items() if key in known}


def _device(options: Options) -> str:
    device: str = options.get("device", "CPU")
    here = _core().available_devices  # GPU.0 and GPU.1 where there are two
    if device not in {"AUTO", *here, *(name.partition(".")[0] for name in here)}:
        raise DeviceError(f"openvino finds no device {device!r} here; there are AUTO, {here}")
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
    """The graph, with sizes and bounds of its inputs as these shapes have them."""
    indices = _indices(model.inputs)
    wanted = {indices[name]: _bounds(spec, shapes) for name, spec in component.inputs.items()}
    model.reshape(wanted)
    return model


def _bounds(spec: TensorSpec, shapes: Shapes) -> Any:
    free = {name: shapes.get(name, ANY) for name in spec.free}
    least = spec.resolve({name: allowed.least for name, allowed in free.items()})
    most = spec.resolve({name: allowed.most for name, allowed in free.items()})
    sizes = zip(least, most, strict=True)
    return ov.PartialShape([ov.Dimension(a, b if b < _UNBOUNDED else -1) for a, b in sizes])
