"""Session of TensorRT: device memory, execution contexts, CUDA graphs, inputs kept on the GPU."""

import mmap
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.backends import CACHE, Options, cuda, differences
from latentforge.runtime.backends.session import CheckedSession, LayerTime, Outputs, Run
from latentforge.runtime.backends.signature import check_signature
from latentforge.runtime.backends.trt import trt_common
from latentforge.runtime.backends.trt.trt_common import CHOICES, RTX, Log, profile_sizes, ranges
from latentforge.runtime.errors import BackendError
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import Feeds
from latentforge.runtime.text import one_line

__all__ = ["TensorrtSession", "is_uploaded"]

_EXTRA_CONTEXTS = 4  # contexts kept in addition to one per profile
_logger = escaping_logger(__name__)
_Key = tuple[int, tuple[tuple[str, int], ...]]


def is_uploaded(
    uploaded: Mapping[str, NDArray[Any] | None], name: str, array: NDArray[Any]
) -> bool:
    """Return True if the GPU has this very array from an earlier run and it cannot have changed."""
    return uploaded.get(name) is array and not array.flags.writeable


@dataclass
class _SizedContext:
    """Execution context and CUDA graph of one size; ``capture`` is True until one was tried."""

    context: Any
    capture: bool
    graph: cuda.CudaGraph | None = None

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()


class TensorrtSession(CheckedSession):
    """Session of a TensorRT engine on the GPU.

    A read-only input (``flags.writeable`` is False) that is the same array object as in the run
    before is not uploaded again: prompt embeddings stay on the GPU from step to step. The session
    holds a reference to such an array until another one replaces it.

    Each size that was run keeps an execution context and a CUDA graph until it is the least
    recently used one; all contexts share the scratch memory of one run.
    """

    def __init__(self, library: Any, path: Path, component: Component, options: Options) -> None:
        super().__init__(component)
        self._library = library
        self._options = options
        self._log = Log(library)
        self._lock = threading.Lock()
        self._resources = ExitStack()
        self._contexts: OrderedDict[_Key, _SizedContext] = OrderedDict()
        self._uploaded: dict[str, NDArray[Any] | None] = {}
        self._times: defaultdict[str, float] = defaultdict(float)
        self._recording = bool(options.get("profile"))
        self._config: Any = None
        self._cache: _Cache | None = None
        weakref.finalize(self, self._resources.close)
        try:
            self._open(path)
        except BaseException as error:
            reason = self._reason(error)
            self.close()
            if not isinstance(error, Exception):
                raise
            raise BackendError(f"{path} does not load: {reason}") from error

    def layers(self) -> list[LayerTime]:
        """Return the time of each layer: see Session.layers()."""
        with self._lock:
            times = self._times if self._recording else {}
            self._recording = False
            return [LayerTime(name, "", seconds) for name, seconds in times.items()]

    def close(self) -> None:
        """Free the engine: see Session.close()."""
        with self._lock:
            if self._cache is not None:
                self._cache.write()
            self._cache = None
            self._resources.close()
            self._uploaded.clear()
            self._config = self._engine = None

    def _run(self, run: Run) -> Outputs:
        with self._lock:
            if self._engine is None:  # closed while this run waited for the lock
                raise self._closed()
            try:
                return self._execute(run.shape_index or 0, run.sizes, run.feeds)
            except BaseException as error:
                self._uploaded.clear()
                with suppress(BackendError):
                    self._stream.synchronize()  # only then may buffers be written again
                if not isinstance(error, Exception):
                    raise
                raise self._failed(error) from error  # with the lock: the log is shared

    def _reason(self, error: BaseException) -> str:
        """Return the error's message and what the library logged about it, on one line."""
        message = one_line(error, limit=None)
        return "; ".join(text for text in (message, self._log.take_errors()) if text)

    def _open(self, path: Path) -> None:
        self._stream = cuda.Stream()
        self._resources.callback(self._stream.close)
        self._engine = self._deserialized(path)
        self._inputs, self._outputs = self._signatures()
        sizes = trt_common.buffer_sizes(self.component)
        self._buffers = {name: self._buffer(size) for name, size in sizes.items()}
        self._scratch_size = max(1, self._engine.device_memory_size_v2)
        self._scratch = self._buffer(self._scratch_size, host=False)
        if self.component.backend == RTX:
            self._config = self._runtime_config(path)
        record = self._times
        self._profiler = trt_common.implement(
            self._library.IProfiler,
            report_layer_time=lambda name, ms: record.__setitem__(name, record[name] + ms / 1e3),
        )
        self._resources.callback(_close_all, self._contexts)
        self._warm_up()

    def _buffer(self, size: int, *, host: bool = True) -> cuda.Buffer:
        buffer = cuda.Buffer(size, host=host)
        self._resources.callback(buffer.close)
        return buffer

    def _deserialized(self, path: Path) -> Any:
        self._runtime = self._library.Runtime(self._log.sink)
        if self._options.get("host_code"):
            self._runtime.engine_host_code_allowed = True
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        ):
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            driver = {k: v for k, v in self.component.device.items() if k == "driver"}
            mismatch = differences(driver, {"driver": cuda.require_gpu().driver})
            raise BackendError(f"{self._library.__name__} refuses it{mismatch and f'; {mismatch}'}")
        if self._options.get("strip"):
            self._refit(engine, path.with_suffix(".onnx"))
        if self._options.get("weight_streaming"):
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    def _refit(self, engine: Any, onnx: Path) -> None:
        """Load the weights that the engine was built without."""
        trt_common.check_links(onnx.parent)
        refitter = self._library.Refitter(engine, self._log.sink)
        parser = self._library.OnnxParserRefitter(refitter, self._log.sink)
        if not parser.refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
            raise BackendError(f"its weights cannot be taken from {onnx}")

    def _signatures(self) -> tuple[list[str], list[str]]:
        """Return the names of the engine's inputs and outputs, once they match the component's."""
        engine, tensors = self._engine, (dict[str, Any](), dict[str, Any]())
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            is_output = engine.get_tensor_mode(name) == self._library.TensorIOMode.OUTPUT
            dtype = trt_common.dtype_of(engine.get_tensor_dtype(name))
            tensors[is_output][name] = dtype, tuple(engine.get_tensor_shape(name))
        # the library may have removed an input that the graph does not use
        inputs = {n: spec for n, spec in self.component.inputs.items() if n in tensors[0]}
        check_signature("input", inputs, tensors[0])
        check_signature("output", self.component.outputs, tensors[1])
        if engine.num_optimization_profiles != len(ranges(self.component)):
            raise BackendError(
                "it was built for other sizes than the manifest records: compile again"
            )
        return list(tensors[0]), list(tensors[1])

    def _runtime_config(self, path: Path) -> Any:
        """Return the runtime settings of TensorRT for RTX, which captures CUDA graphs itself."""
        library, config = self._library, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            library.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._uses_graphs():
            config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if kernels := self._options.get("kernels"):
            strategies = library.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = getattr(
                strategies, CHOICES["kernels"][kernels]
            )
        self._cache = _Cache(config, path.with_name(path.name + CACHE))
        return config

    def _uses_graphs(self) -> bool:
        """Return True to use CUDA graphs; profiling and weight streaming exclude them."""
        options = self._options
        prevented = self._recording or options.get("weight_streaming")
        return bool(options.get("graphs", True)) and not prevented

    def _warm_up(self) -> None:
        """Run each profile's optimal size once, so that no later run waits for preparations."""
        for index, shapes in enumerate(ranges(self.component)):
            sizes = profile_sizes(shapes)[1]
            specs = self.component.inputs.items()
            self._execute(index, sizes, {n: np.zeros(s.resolve(sizes), s.dtype) for n, s in specs})
        self._times.clear()
        self._log.take_errors()  # such as of a refused cache: not to be reported with later errors
        if self._cache is not None:
            self._cache.write()

    def _execute(self, index: int, sizes: Mapping[str, int], feeds: Feeds) -> Outputs:
        for name in self._inputs:
            self._upload(name, feeds[name])
        self._launch(self._context_for(index, sizes))
        specs = {name: self.component.outputs[name] for name in self._outputs}
        for name, spec in specs.items():
            self._buffers[name].download(trt_common.byte_count(spec, sizes), self._stream)
        self._stream.synchronize()
        return {
            name: self._buffers[name].array(spec.dtype, spec.resolve(sizes)).copy()
            for name, spec in specs.items()
        }

    def _upload(self, name: str, array: NDArray[Any]) -> None:
        if is_uploaded(self._uploaded, name, array):
            return
        self._uploaded[name] = None
        np.copyto(self._buffers[name].array(array.dtype.name, array.shape), array)
        self._buffers[name].upload(array.nbytes, self._stream)
        if not array.flags.writeable:
            self._uploaded[name] = array

    def _launch(self, ready: _SizedContext) -> None:
        if ready.graph is not None:
            ready.graph.launch()
            return
        self._enqueue(ready.context)
        if ready.capture:  # after the first run of a size, in which TensorRT initializes itself
            ready.capture = False
            try:
                ready.graph = self._stream.capture(lambda: self._enqueue(ready.context))
            except BackendError as error:
                self._log.take_errors()
                _logger.info("%s runs without a CUDA graph: %s", self.component.file, error)

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(int(self._stream)):
            raise BackendError("the library refuses to run it")

    def _context_for(self, index: int, sizes: Mapping[str, int]) -> _SizedContext:
        """Return the context of a size: kept, or new in place of the least recently used one."""
        key = index, tuple(sorted(sizes.items()))
        if key not in self._contexts:
            while len(self._contexts) >= len(ranges(self.component)) + _EXTRA_CONTEXTS:
                self._contexts.popitem(last=False)[1].close()
            capture = self._config is None and self._uses_graphs()
            self._contexts[key] = _SizedContext(self._context(index, sizes), capture)
        self._contexts.move_to_end(key)
        return self._contexts[key]

    def _context(self, index: int, sizes: Mapping[str, int]) -> Any:
        """Return a new execution context that is bound to one size for its lifetime.

        A captured graph refers to state of its context, so that no two graphs may share one.
        """
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(
            strategy if self._config is None else self._config
        )
        if context is None:
            raise BackendError("the library cannot create an execution context")
        context.set_device_memory(self._scratch.address, self._scratch_size)
        done = [context.set_optimization_profile_async(index, int(self._stream))]
        self._stream.synchronize()
        for name in self._inputs:
            done.append(context.set_input_shape(name, self.component.inputs[name].resolve(sizes)))
        for name in (*self._inputs, *self._outputs):
            done.append(context.set_tensor_address(name, self._buffers[name].address))
        for name in self._outputs:
            shape, spec = context.get_tensor_shape(name), self.component.outputs[name]
            if tuple(shape) != spec.resolve(sizes):
                expected = list(spec.resolve(sizes))
                raise BackendError(
                    f"output {name}: expected {expected} (manifest: {spec}), found {list(shape)}"
                )
        if not all(done):
            raise BackendError("the library refuses the size")
        if self._recording:
            context.profiler = self._profiler
        return context


def _close_all(contexts: OrderedDict[_Key, _SizedContext]) -> None:
    for context in contexts.values():
        context.close()
    contexts.clear()


class _Cache:
    """File beside an engine with the kernels that TensorRT for RTX compiled for this GPU.

    The library validates the file, and starts from an empty cache if it is damaged or belongs to
    another GPU.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._path = path
        self._cache = config.create_runtime_cache()
        try:
            self._content = path.read_bytes()
        except OSError:
            self._content = b""
        if self._content and not self._cache.deserialize(self._content):
            self._content = b""
        config.set_runtime_cache(self._cache)

    def write(self) -> None:
        """Write the file if the cache has changed."""
        content = self._cache.serialize()
        if content is not None and (now := bytes(content)) != self._content:
            self._content = now
            trt_common.write_cache(self._path, now)
