"""Sessions of ONNX Runtime whose inputs and outputs stay on a device."""

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from latentforge.runtime.backends.ort.ort_session import LayerRecording, error_message
from latentforge.runtime.backends.session import CheckedSession, LayerTime, Outputs, Run
from latentforge.runtime.errors import BackendError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import Feeds, TensorSpec

__all__ = ["GPU_LOCK", "DeviceSession", "Place"]

GPU_LOCK = threading.Lock()
"""Held while the GPU is used: no thread of the process may allocate while a graph is captured."""

_MAX_KEPT_SIZES = 8  # sizes whose buffers and captured graphs are kept

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Device that holds inputs and outputs; tests use the CPU."""

    kind: str = "cuda"  # in ONNX Runtime's words
    index: int = 0
    memory: Any = None  # memory information of a plugin provider, instead of kind and index

    def allocate(self, spec: TensorSpec, sizes: Mapping[str, int]) -> ort.OrtValue:
        """Return an uninitialized tensor on the device."""
        make = ort.OrtValue.ortvalue_from_shape_and_type
        shape, dtype = list(spec.resolve(sizes)), np.dtype(spec.dtype)
        if self.memory is not None:
            return make(shape, dtype, memory_info=self.memory)
        return make(shape, dtype, self.kind, self.index)

    def upload(self, array: NDArray[np.generic], value: ort.OrtValue) -> None:
        """Copy an array into a tensor of the same dtype and shape."""
        if self.memory is None:
            value.update_inplace(array)
            return
        whole = array if array.flags.c_contiguous else array.copy()
        ort.copy_tensors([ort.OrtValue.ortvalue_from_numpy(whole)], [value])


@dataclass(kw_only=True)
class _Buffers:
    """Inputs and outputs for one size, and the arrays uploaded last."""

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
                self.uploaded[name] = array  # holding it keeps its identity from being reused


class DeviceSession(CheckedSession):
    """Loaded graph whose inputs and outputs stay on a device.

    Inputs have fixed addresses, as CUDA graphs require. A read-only input array that is the same
    object as in the last run of that size is not uploaded again: callers must not change the
    memory of such an array.

    Runs are serialized in one thread that belongs to the session, since captured graphs and the
    libraries' state for them are bound to a thread.
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
        super().__init__(component)
        self._engine = session
        self._place = place
        self._record = record
        self._graphs = itertools.count(1) if graphs else None
        self._buffers: OrderedDict[Any, _Buffers] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="latentforge-gpu")

    def _run(self, run: Run) -> Outputs:
        return self._in_thread(lambda: self._run_bound(run))

    def _reason(self, error: BaseException) -> str:
        return error_message(error)

    def layers(self) -> list[LayerTime]:
        if self._record is None or self._engine is None:
            return []
        record = self._record
        return self._in_thread(lambda: record.layers(self._engine))

    def close(self) -> None:
        with contextlib.suppress(BackendError):
            self.layers()
            self._in_thread(self._free)
        self._thread.shutdown()

    def _in_thread(self, work: Callable[[], _T]) -> _T:
        try:
            future = self._thread.submit(work)
        except RuntimeError:  # the thread has ended
            raise self._closed() from None
        return future.result()

    def _run_bound(self, run: Run) -> Outputs:
        if self._engine is None:  # closed after the run was queued
            raise self._closed()
        key = (run.shape_index, *run.sizes.items())
        with GPU_LOCK:
            # buffers are out of the table while they run, so that a failed run drops them
            buffers = self._buffers.pop(key, None) or self._new_buffers(run)
            buffers.fill(run.feeds)
            run.engine.run_with_iobinding(buffers.binding, buffers.settings)
            values = buffers.binding.copy_outputs_to_cpu()
            self._keep(run.engine, key, buffers)
        return dict(zip(self.component.outputs, values, strict=True))

    def _keep(self, session: ort.InferenceSession, key: Any, buffers: _Buffers) -> None:
        """Keep the buffers of the size that ran last, and drop the least recently used ones."""
        self._buffers[key] = buffers
        if len(self._buffers) > _MAX_KEPT_SIZES:
            _, old = self._buffers.popitem(last=False)
            if old.graph is not None and hasattr(session, "release_captured_graph"):
                session.release_captured_graph(old.graph)

    def _new_buffers(self, run: Run) -> _Buffers:
        specs, place = self.component, self._place
        binding = run.engine.io_binding()
        inputs = {name: place.allocate(spec, run.sizes) for name, spec in specs.inputs.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, spec in specs.outputs.items():
            binding.bind_ortvalue_output(name, place.allocate(spec, run.sizes))
        graph = next(self._graphs) if self._graphs else None
        settings = _run_settings(graph, run.shape_index if len(specs.shapes) > 1 else None)
        return _Buffers(place=place, binding=binding, inputs=inputs, settings=settings, graph=graph)

    def _free(self) -> None:
        with GPU_LOCK:
            self._buffers.clear()
            self._engine = None


def _run_settings(graph: int | None, profile: int | None) -> ort.RunOptions:
    settings = ort.RunOptions()
    if graph is not None:
        settings.add_run_config_entry("gpu_graph_id", str(graph))
        # TensorRT for RTX's name for it
        settings.add_run_config_entry("cuda_graph_annotation_id", str(graph))
    if profile is not None:
        settings.add_run_config_entry("nv_profile_index", str(profile))
    return settings
