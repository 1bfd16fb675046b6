"""Sessions of ONNX Runtime whose inputs and outputs stay on a device."""

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnxruntime as ort

from latentforge.runtime.backends.ort.device_memory import GPU_LOCK, OrtArray, Place
from latentforge.runtime.backends.ort.ort_session import LayerRecording, error_message
from latentforge.runtime.backends.session import LayerTime, ResidentSession, Run
from latentforge.runtime.errors import BackendError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import DeviceArray, Tensor, Tensors, TensorSpec

__all__ = ["DeviceSession"]

_MAX_KEPT_SIZES = 8  # sizes whose buffers and captured graphs are kept

_T = TypeVar("_T")


@dataclass(kw_only=True)
class _Buffers:
    """Inputs and outputs for one size, and the arrays copied last."""

    place: Place
    binding: ort.IOBinding
    inputs: Mapping[str, ort.OrtValue]
    outputs: Mapping[str, ort.OrtValue]
    settings: ort.RunOptions
    graph: int | None
    filled: dict[str, Tensor] = field(default_factory=dict)

    def fill(self, feeds: Tensors) -> None:
        for name, tensor in feeds.items():
            if self.filled.get(name) is tensor and _is_constant(tensor):
                continue
            self.filled.pop(name, None)
            self.place.fill(self.inputs[name], tensor)
            if _is_constant(tensor):
                self.filled[name] = tensor  # holding it keeps its identity from being reused

    def results(self, run: Run, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        """Return the outputs: on the device those to keep, which are copied there."""
        if not run.keep:
            return dict(zip(specs, self.binding.copy_outputs_to_cpu(), strict=True))
        self.binding.synchronize_outputs()
        made: dict[str, Tensor] = {}
        for name, spec in specs.items():
            value, shape = self.outputs[name], spec.resolve(run.sizes)
            if name in run.keep:
                made[name] = self.place.kept(value, spec, run.sizes)
            else:
                made[name] = self.place.download(value, spec.dtype, shape)
        return made


def _is_constant(tensor: Tensor) -> bool:
    return isinstance(tensor, DeviceArray) or not tensor.flags.writeable


class DeviceSession(ResidentSession):
    """Loaded graph whose inputs and outputs stay on a device.

    Inputs have fixed addresses, as CUDA graphs require. A read-only input array that is the same
    object as in the last run of that size is not uploaded again: callers must not change the
    memory of such an array. Outputs to keep are copied within the device, since the next run writes
    to the same addresses.

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

    def _run(self, run: Run) -> Tensors:
        return self._in_thread(lambda: self._run_bound(run))

    def _reason(self, error: BaseException) -> str:
        return error_message(error)

    def _holds(self, array: DeviceArray) -> bool:
        return isinstance(array, OrtArray) and array.place == self._place

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

    def _run_bound(self, run: Run) -> Tensors:
        if self._engine is None:  # closed after the run was queued
            raise self._closed()
        key = (run.shape_index, *run.sizes.items())
        with GPU_LOCK:
            # buffers are out of the table while they run, so that a failed run drops them
            buffers = self._buffers.pop(key, None) or self._new_buffers(run)
            buffers.fill(run.feeds)
            run.engine.run_with_iobinding(buffers.binding, buffers.settings)
            results = buffers.results(run, self.component.outputs)
            self._keep(run.engine, key, buffers)
        return results

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
        outputs = {name: place.allocate(spec, run.sizes) for name, spec in specs.outputs.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        graph = next(self._graphs) if self._graphs else None
        return _Buffers(
            place=place,
            binding=binding,
            inputs=inputs,
            outputs=outputs,
            settings=_run_settings(graph, run.shape_index if len(specs.shapes) > 1 else None),
            graph=graph,
        )

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
