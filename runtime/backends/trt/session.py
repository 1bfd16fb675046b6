"""A TensorRT engine on the GPU: memory, execution contexts, graphs, and what stays between runs."""

import logging
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

from latentforge.runtime.backends import (
    CACHE,
    LayerTime,
    Options,
    cuda,
    differences,
)
from latentforge.runtime.backends.trt.library import (
    CHOICES,
    RTX,
    Log,
    buffer_sizes,
    byte_count,
    check_links,
    check_signature,
    dtype_of,
    implemented,
    ranges,
    sizes_of,
    write_cache,
)
from latentforge.runtime.errors import BackendError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import Feeds
from latentforge.runtime.text import one_line

__all__ = ["TensorrtSession", "is_there"]

_SPARE = 4  # sizes that stay ready beside the usual ones
_logger = logging.getLogger(__name__)
_Key = tuple[int, tuple[tuple[str, int], ...]]


def is_there(sent: Mapping[str, NDArray[Any] | None], name: str, array: NDArray[Any]) -> bool:
    """Whether the GPU has an input already: the same array as before, that cannot have changed."""
    return sent.get(name) is array and not array.flags.writeable


@dataclass
class _Ready:
    """A context for one size, and its captured work; ``capture`` says to try that once."""

    context: Any
    capture: bool
    graph: cuda.CudaGraph | None = None

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()


class TensorrtSession:
    """An engine on the GPU.

    An input that may not be written to (``flags.writeable`` is False) and that is the very array
    of the run before is not copied to the GPU again: embeddings of a prompt stay there from step
    to step. The session holds such an array until another takes its place.

    Every size that is run keeps an execution context, and a CUDA graph of its own, until others
    push it out; all of them share the memory that one run takes.
    """

    def __init__(self, library: Any, path: Path, component: Component, options: Options) -> None:
        self.component = component
        self._library = library
        self._options = options
        self._log = Log(library)
        self._lock = threading.Lock()
        self._held = ExitStack()
        self._ready: OrderedDict[_Key, _Ready] = OrderedDict()
        self._sent: dict[str, NDArray[Any] | None] = {}
        self._times: defaultdict[str, float] = defaultdict(float)
        self._recording = bool(options.get("profile"))
        self._engine: Any = None
        self._config: Any = None
        self._cache: _Cache | None = None
        weakref.finalize(self, self._held.close)
        try:
            self._open(path)
        except BaseException as error:
            reason = self._reason(error)
            self.close()
            if not isinstance(error, Exception):
                raise
            raise BackendError(f"{path} does not load: {reason}") from error

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        with self._lock:
            if self._engine is None:
                raise BackendError(f"{self.component.file} is closed")
            sizes, index = self.component.fit(feeds)
            try:
                return self._run(index or 0, sizes, feeds)
            except BaseException as error:
                self._sent.clear()
                with suppress(BackendError):
                    self._stream.synchronize()  # buffers may be written again only then
                if not isinstance(error, Exception):
                    raise
                reason = self._reason(error)
                raise BackendError(f"{self.component.file} failed: {reason}") from error

    def layers(self) -> list[LayerTime]:
        with self._lock:
            times = self._times if self._recording else {}
            self._recording = False
            return [LayerTime(name, "", seconds) for name, seconds in times.items()]

    def close(self) -> None:
        with self._lock:
            if self._cache is not None:
                self._cache.write()
            self._cache = None
            self._held.close()
            self._sent.clear()
            self._config = self._engine = None

    def _reason(self, error: BaseException) -> str:
        """What an error says, and what the library logged of it, in one line."""
        said = one_line(error, limit=None)
        return "; ".join(text for text in (said, self._log.said()) if text)

    def _open(self, path: Path) -> None:
        self._stream = cuda.Stream()
        self._held.callback(self._stream.close)
        self._engine = self._deserialized(path)
        self._inputs, self._outputs = self._signatures()
        sizes = buffer_sizes(self.component)
        self._buffers = {name: self._buffer(size) for name, size in sizes.items()}
        self._scratch_size = max(1, self._engine.device_memory_size_v2)
        self._scratch = self._buffer(self._scratch_size, host=False)
        if self.component.backend == RTX:
            self._config = self._runtime_config(path)
        record = self._times
        self._profiler = implemented(
            self._library.IProfiler,
            report_layer_time=lambda name, ms: record.__setitem__(name, record[name] + ms / 1e3),
        )
        self._held.callback(_let_go, self._ready)
        self._warm_up()

    def _buffer(self, size: int, *, host: bool = True) -> cuda.Buffer:
        buffer = cuda.Buffer(size, host=host)
        self._held.callback(buffer.close)
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
            found = differences(driver, {"driver": cuda.found().driver})
            raise BackendError(f"{self._library.__name__} refuses it{found and f'; {found}'}")
        if self._options.get("strip"):
            self._refit(engine, path.with_suffix(".onnx"))
        if self._options.get("weight_streaming"):
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    def _refit(self, engine: Any, onnx: Path) -> None:
        """Fill in weights that were left out."""
        check_links(onnx.parent)
        refitter = self._library.Refitter(engine, self._log.sink)
        parser = self._library.OnnxParserRefitter(refitter, self._log.sink)
        if not parser.refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
            raise BackendError(f"its weights cannot be taken from {onnx}")

    def _signatures(self) -> tuple[list[str], list[str]]:
        """The engine's inputs and outputs, which are the component's."""
        engine, found = self._engine, (dict[str, Any](), dict[str, Any]())
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            is_output = engine.get_tensor_mode(name) == self._library.TensorIOMode.OUTPUT
            kind, shape = dtype_of(engine.get_tensor_dtype(name)), engine.get_tensor_shape(name)
            found[is_output][name] = kind, tuple(shape)
        # an input that the graph makes nothing of may be gone
        inputs = {
            name: self.component.inputs[name] for name in self.component.inputs.keys() & found[0]
        }
        check_signature("input", inputs, found[0])
        check_signature("output", self.component.outputs, found[1])
        if engine.num_optimization_profiles != len(ranges(self.component)):
            raise BackendError("it was built for other sizes than the manifest says: compile again")
        return list(found[0]), list(found[1])

    def _runtime_config(self, path: Path) -> Any:
        """How TensorRT for RTX is to run: with graphs of its own, which wait for its kernels."""
        library, config = self._library, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            library.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._wants_graphs():
            config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if kernels := self._options.get("kernels"):
            strategies = library.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = getattr(
                strategies, CHOICES["kernels"][kernels]
            )
        self._cache = _Cache(config, path.with_name(path.name + CACHE))
        return config

    def _wants_graphs(self) -> bool:
        """Layers are not timed within a graph, and weights are not streamed there."""
        options = self._options
        prevented = self._recording or options.get("weight_streaming")
        return bool(options.get("graphs", True)) and not prevented

    def _warm_up(self) -> None:
        """Run the usual size of each profile, so that no later run waits for preparations."""
        for index, shapes in enumerate(ranges(self.component)):
            usual = sizes_of(shapes)[1]
            specs = self.component.inputs.items()
            self._run(index, usual, {n: np.zeros(s.resolve(usual), s.dtype) for n, s in specs})
        self._times.clear()
        self._log.said()  # a cache that was refused is no matter for later errors
        if self._cache is not None:
            self._cache.write()

    def _run(
        self, index: int, sizes: Mapping[str, int], feeds: Feeds
    ) -> dict[str, NDArray[np.generic]]:
        for name in self._inputs:
            self._upload(name, feeds[name])
        self._launch(self._ready_for(index, sizes))
        specs = {name: self.component.outputs[name] for name in self._outputs}
        for name, spec in specs.items():
            self._buffers[name].download(byte_count(spec, sizes), self._stream)
        self._stream.synchronize()
        return {
            name: self._buffers[name].array(spec.dtype, spec.resolve(sizes)).copy()
            for name, spec in specs.items()
        }

    def _upload(self, name: str, array: NDArray[Any]) -> None:
        if is_there(self._sent, name, array):
            return
        self._sent[name] = None
        np.copyto(self._buffers[name].array(array.dtype.name, array.shape), array)
        self._buffers[name].upload(array.nbytes, self._stream)
        if not array.flags.writeable:
            self._sent[name] = array

    def _launch(self, ready: _Ready) -> None:
        if ready.graph is not None:
            ready.graph.launch()
            return
        self._enqueue(ready.context)
        if ready.capture:  # only now, as TensorRT prepares itself in the first run of a size
            ready.capture = False
            try:
                ready.graph = self._stream.captured(lambda: self._enqueue(ready.context))
            except BackendError as error:
                self._log.said()
                _logger.info("%s runs without a CUDA graph: %s", self.component.file, error)

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(int(self._stream)):
            raise BackendError("the library does not run it")

    def _ready_for(self, index: int, sizes: Mapping[str, int]) -> _Ready:
        """What runs a size: kept from before, or made in place of the longest unused."""
        key = index, tuple(sorted(sizes.items()))
        if key not in self._ready:
            while len(self._ready) >= len(ranges(self.component)) + _SPARE:
                self._ready.popitem(last=False)[1].close()
            capture = self._config is None and self._wants_graphs()
            self._ready[key] = _Ready(self._context(index, sizes), capture)
        self._ready.move_to_end(key)
        return self._ready[key]

    def _context(self, index: int, sizes: Mapping[str, int]) -> Any:
        """An execution context that is bound to one size, for as long as it lives.

        A captured graph holds on to state of its context, so that no two may share one.
        """
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(
            strategy if self._config is None else self._config
        )
        if context is None:
            raise BackendError("the library makes no execution context")
        context.set_device_memory(self._scratch.address, self._scratch_size)
        done = [context.set_optimization_profile_async(index, int(self._stream))]
        self._stream.synchronize()
        for name in self._inputs:
            done.append(context.set_input_shape(name, self.component.inputs[name].resolve(sizes)))
        for name in (*self._inputs, *self._outputs):
            done.append(context.set_tensor_address(name, self._buffers[name].address))
        for name in self._outputs:
            given, said = context.get_tensor_shape(name), self.component.outputs[name]
            if tuple(given) != said.resolve(sizes):
                raise BackendError(f"output {name} is {list(given)}, and the manifest says {said}")
        if not all(done):
            raise BackendError("the library refuses the size")
        if self._recording:
            context.profiler = self._profiler
        return context


def _let_go(ready: OrderedDict[_Key, _Ready]) -> None:
    for each in ready.values():
        each.close()
    ready.clear()


class _Cache:
    """Kernels that TensorRT for RTX compiled for this GPU, in a file beside the engine.

    The library checks what it reads, and begins anew where that is damaged or of another GPU.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._path = path
        self._cache = config.create_runtime_cache()
        try:
            self._known = path.read_bytes()
        except OSError:
            self._known = b""
        if self._known and not self._cache.deserialize(self._known):
            self._known = b""
        config.set_runtime_cache(self._cache)

    def write(self) -> None:
        """Write the file, if there is anything new to write."""
        content = self._cache.serialize()
        if content is not None and (now := bytes(content)) != self._known:
            self._known = now
            write_cache(self._path, now)
