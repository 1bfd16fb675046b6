"""What engines on a GPU need of CUDA, through cuda-bindings, with every status looked at.

The GPU is the first that CUDA shows; CUDA_VISIBLE_DEVICES says which that is. Nothing is imported
before it is asked for, so that plans and errors can be made where there is no CUDA.

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

__all__ = ["Buffer", "Gpu", "CudaGraph", "Stream", "found", "free_memory", "gpu"]

_DEVICE = 0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, and what its driver can do.

    Attributes:
        capability: its compute capability, such as ``8.9``.
        driver: the newest version of CUDA that the driver knows, such as ``13.0``.
        memory: bytes that it has.
    """

    name: str
    capability: str
    driver: str
    memory: int


def gpu() -> Gpu | None:
    """The GPU, or None where there is none, or no cuda-bindings to reach it."""
    try:
        return found()
    except BackendError:
        return None


def free_memory() -> int | None:
    """Bytes of the GPU's memory that nobody uses, or None where there is no GPU."""
    try:
        found()
        free, _ = _call("cudaMemGetInfo")
    except BackendError:
        return None
    return int(free)


def found() -> Gpu:
    """The GPU.

    Raises:
        DeviceError: there is none, no driver for it, or no cuda-bindings.
    """
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
        memory=int(properties.totalGlobalMem),
    )


class Stream:
    """A queue of work for the GPU, done in order. ``int()`` of it is what libraries take."""

    def __init__(self) -> None:
        _call("cudaSetDevice", _DEVICE)
        self._handle = _call("cudaStreamCreateWithFlags", _library().cudaStreamNonBlocking)

    def __int__(self) -> int:
        return int(self._handle)

    def synchronize(self) -> None:
        """Wait until all of it is done; says so if some of it failed."""
        _call("cudaStreamSynchronize", self._handle)

    def captured(self, work: Callable[[], None]) -> "CudaGraph":
        """A graph of what some work would put into this stream; nothing of it is done.

        Raises:
            BackendError: the work is of a kind that cannot be captured.
        """
        cuda = _library()
        # other threads may go on to allocate meanwhile
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call("cudaStreamBeginCapture", self._handle, mode)
        try:
            work()
        except BaseException:
            cuda.cudaStreamEndCapture(self._handle)  # which the stream needs to go on
            cuda.cudaGetLastError()
            raise
        return CudaGraph(_call("cudaStreamEndCapture", self._handle), self)

    def close(self) -> None:
        """Give it back."""
        _release("cudaStreamDestroy", self._handle)


class CudaGraph:
    """Captured work, which one call repeats."""

    def __init__(self, captured: Any, stream: Stream) -> None:
        self._stream = stream
        try:
            self._handle = _call("cudaGraphInstantiate", captured, 0)
        finally:
            _release("cudaGraphDestroy", captured)

    def launch(self) -> None:
        """Put the work into the stream that it was captured from."""
        _call("cudaGraphLaunch", self._handle, self._stream._handle)

    def close(self) -> None:
        """Give it back."""
        _release("cudaGraphExecDestroy", self._handle)


class Buffer:
    """Memory on the GPU, and as much that is locked in the host's, to copy from and to.

    Copies between locked memory and the GPU need no intermediate one and do not block.

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
        """The first bytes of the host's memory as an array, not a copy."""
        assert self._host is not None
        memory: Any = (ctypes.c_char * self._size).from_address(self._host)
        return np.ndarray(shape, dtype, memory)

    def upload(self, size: int, stream: Stream) -> None:
        """Put a copy of the host's first bytes to the GPU into a stream."""
        kind = _library().cudaMemcpyKind.cudaMemcpyHostToDevice
        _call("cudaMemcpyAsync", self.address, self._host, size, kind, stream._handle)

    def download(self, size: int, stream: Stream) -> None:
        """Put a copy of the GPU's first bytes to the host into a stream."""
        kind = _library().cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call("cudaMemcpyAsync", self._host, self.address, size, kind, stream._handle)

    def close(self) -> None:
        """Give both back. Arrays of it must be gone."""
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
    """Call a function of the CUDA runtime, and return what it returns beside its status."""
    cuda = _library()
    status, *values = getattr(cuda, name)(*arguments)
    if status != cuda.cudaError_t.cudaSuccess:
        cuda.cudaGetLastError()  # or the next call would be told of it again
        raise BackendError(f"{name}: {_text(cuda, status)}")
    return values[0] if len(values) == 1 else values


def _release(name: str, handle: Any) -> None:
    """Give something back; a failure of earlier work, which is told again here, changes nothing."""
    with suppress(BackendError):
        _call(name, handle)


def _text(cuda: Any, status: Any) -> str:
    return str(cuda.cudaGetErrorString(status)[1].decode())
