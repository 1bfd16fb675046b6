"""CUDA for engines on a GPU: device, streams, graphs and buffers, with every status checked.

The GPU is the first that CUDA lists; set CUDA_VISIBLE_DEVICES to select another. cuda-bindings is
imported at the first call only, so that plans and errors can be made on machines without CUDA.

Names and semantics: CUDA Runtime API, https://docs.nvidia.com/cuda/cuda-runtime-api/.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import BackendError, DeviceError

__all__ = ["Buffer", "CudaGraph", "Gpu", "Stream", "find_gpu", "free_memory", "require_gpu"]

_DEVICE = 0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """GPU and its driver.

    Attributes:
        name: of the product.
        capability: compute capability, such as ``8.9``.
        driver: newest version of CUDA that the driver supports, such as ``13.0``.
    """

    name: str
    capability: str
    driver: str


def find_gpu() -> Gpu | None:
    """Return the GPU, or None if there is none or cuda-bindings is not installed."""
    try:
        return require_gpu()
    except BackendError:
        return None


def free_memory() -> int | None:
    """Return the bytes of free memory on the GPU, or None without a GPU."""
    try:
        require_gpu()
        free, _ = _call("cudaMemGetInfo")
    except BackendError:
        return None
    return int(free)


def require_gpu() -> Gpu:
    """Return the GPU; DeviceError if there is none, no driver or no cuda-bindings."""
    cuda = _library()
    driver = cuda.cudaDriverGetVersion()[1]
    status, count = cuda.cudaGetDeviceCount()
    if status != cuda.cudaError_t.cudaSuccess or not count:
        reason = _text(cuda, status) if driver else "no NVIDIA driver is loaded"
        raise DeviceError(f"this needs an NVIDIA GPU, and CUDA finds none here: {reason}")
    properties = _call("cudaGetDeviceProperties", _DEVICE)
    return Gpu(
        name=properties.name.decode().rstrip("\0"),
        capability=f"{properties.major}.{properties.minor}",
        driver=f"{driver // 1000}.{driver % 1000 // 10}",
    )


class Stream:
    """CUDA stream: work for the GPU, done in order. ``int()`` gives the handle for libraries."""

    def __init__(self) -> None:
        _call("cudaSetDevice", _DEVICE)
        self._handle = _call("cudaStreamCreateWithFlags", _library().cudaStreamNonBlocking)

    def __int__(self) -> int:
        return int(self._handle)

    def synchronize(self) -> None:
        """Wait until all work is done; BackendError if some of it failed."""
        _call("cudaStreamSynchronize", self._handle)

    def capture(self, work: Callable[[], None]) -> "CudaGraph":
        """Return a graph of the work that a function puts into this stream, without executing it.

        Raises:
            BackendError: work of this kind cannot be captured.
        """
        cuda = _library()
        # in this mode other threads may allocate meanwhile
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call("cudaStreamBeginCapture", self._handle, mode)
        try:
            work()
        except BaseException:
            cuda.cudaStreamEndCapture(self._handle)  # or the stream stays in capture mode
            cuda.cudaGetLastError()
            raise
        return CudaGraph(_call("cudaStreamEndCapture", self._handle), self)

    def close(self) -> None:
        """Free it."""
        _release("cudaStreamDestroy", self._handle)


class CudaGraph:
    """Captured work that one call replays."""

    def __init__(self, captured: Any, stream: Stream) -> None:
        self._stream = stream
        try:
            self._handle = _call("cudaGraphInstantiate", captured, 0)
        finally:
            _release("cudaGraphDestroy", captured)

    def launch(self) -> None:
        """Replay the work in the stream that it was captured from."""
        _call("cudaGraphLaunch", self._handle, self._stream._handle)

    def close(self) -> None:
        """Free it."""
        _release("cudaGraphExecDestroy", self._handle)


class Buffer:
    """Memory on the GPU, with page-locked host memory of the same size to copy from and to.

    Copies between page-locked memory and the GPU need no intermediate buffer and do not block.

    Attributes:
        address: of the memory on the GPU.
    """

    def __init__(self, size: int, *, host: bool = True) -> None:
        self.address = int(_call("cudaMalloc", size))
        self._host: int | None = None
        try:
            self._host = int(_call("cudaMallocHost", size)) if host else None
        except BackendError:
            self.close()
            raise
        self._size = size

    def array(self, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
        """Return the beginning of the host memory as an array that shares the memory."""
        assert self._host is not None
        memory: Any = (ctypes.c_char * self._size).from_address(self._host)
        return np.ndarray(shape, dtype, memory)

    def upload(self, size: int, stream: Stream) -> None:
        """Enqueue a copy of the first ``size`` bytes from the host to the GPU."""
        kind = _library().cudaMemcpyKind.cudaMemcpyHostToDevice
        _call("cudaMemcpyAsync", self.address, self._host, size, kind, stream._handle)

    def download(self, size: int, stream: Stream) -> None:
        """Enqueue a copy of the first ``size`` bytes from the GPU to the host."""
        kind = _library().cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call("cudaMemcpyAsync", self._host, self.address, size, kind, stream._handle)

    def close(self) -> None:
        """Free both. Arrays from array() must not be used afterwards."""
        _release("cudaFree", self.address)
        if self._host is not None:
            _release("cudaFreeHost", self._host)


def _library() -> Any:
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DeviceError(
            f"CUDA cannot be reached without cuda-bindings ({error}): pip install cuda-bindings"
        ) from error


def _call(name: str, *arguments: Any) -> Any:
    """Return the results of a function of the CUDA runtime; BackendError if its status is one."""
    cuda = _library()
    status, *values = getattr(cuda, name)(*arguments)
    if status != cuda.cudaError_t.cudaSuccess:
        cuda.cudaGetLastError()  # or the next call would report it again
        raise BackendError(f"{name}: {_text(cuda, status)}")
    return values[0] if len(values) == 1 else values


def _release(name: str, handle: Any) -> None:
    """Free a handle; errors of earlier work, which CUDA reports again here, are ignored."""
    with suppress(BackendError):
        _call(name, handle)


def _text(cuda: Any, status: Any) -> str:
    return str(cuda.cudaGetErrorString(status)[1].decode())
