"""Tensors of ONNX Runtime in a device's memory: allocation, copies, and arrays that stay there."""

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from latentforge.runtime.errors import BackendError
from latentforge.runtime.tensor import DeviceArray, Tensor, TensorSpec, on_host

__all__ = ["GPU_LOCK", "OrtArray", "Place"]

GPU_LOCK = threading.Lock()
"""Held while the GPU is used: no thread of the process may allocate while a graph is captured."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Device that holds inputs and outputs; tests use the CPU."""

    kind: str = "cuda"  # in ONNX Runtime's words
    index: int = 0
    memory: Any = None  # memory information of a plugin provider, instead of kind and index

    def allocate(self, spec: TensorSpec, sizes: Mapping[str, int]) -> ort.OrtValue:
        """Return an uninitialized tensor on the device."""
        return self._allocate(spec.resolve(sizes), np.dtype(spec.dtype))

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ort.OrtValue:
        make = ort.OrtValue.ortvalue_from_shape_and_type
        if self.memory is not None:
            return make(list(shape), dtype, memory_info=self.memory)
        return make(list(shape), dtype, self.kind, self.index)

    def fill(self, value: ort.OrtValue, tensor: Tensor) -> None:
        """Copy an array of this place or of the host into a tensor of the same dtype and shape."""
        if isinstance(tensor, OrtArray):
            self._copy(tensor.value, value, tensor)
            return
        array = on_host(tensor)
        if self.memory is None:
            value.update_inplace(array)
        else:
            whole = array if array.flags.c_contiguous else array.copy()
            ort.copy_tensors([ort.OrtValue.ortvalue_from_numpy(whole)], [value])

    def kept(self, value: ort.OrtValue, spec: TensorSpec, sizes: Mapping[str, int]) -> "OrtArray":
        """Return a copy of a tensor, which stays on the device when the tensor is written again."""
        array = OrtArray(self, self.allocate(spec, sizes), spec.dtype, spec.resolve(sizes))
        self._copy(value, array.value, array)
        return array

    def download(self, value: ort.OrtValue, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a tensor's content in the host's memory."""
        if self.memory is None:
            return np.array(value.numpy())  # a tensor on the CPU lends its own memory
        made = np.empty(shape, dtype)
        ort.copy_tensors([value], [ort.OrtValue.ortvalue_from_numpy(made)])
        return made

    def _copy(self, source: ort.OrtValue, target: ort.OrtValue, like: DeviceArray) -> None:
        """Copy a tensor within the device, and wait: runs use streams of their own."""
        size = int(np.prod(like.shape)) * like.dtype.itemsize
        if self.memory is not None:
            ort.copy_tensors([source], [target])
        elif self.kind == "cuda":
            _copy_on_gpu(source.data_ptr(), target.data_ptr(), size)
        else:
            ctypes.memmove(target.data_ptr(), source.data_ptr(), size)


class OrtArray(DeviceArray):
    """Array that a session of ONNX Runtime left on its device.

    Attributes:
        place: the device.
        value: the library's tensor.
    """

    def __init__(
        self, place: Place, value: ort.OrtValue, dtype: str, shape: tuple[int, ...]
    ) -> None:
        super().__init__(dtype, shape)
        self.place = place
        self.value = value

    def _download(self) -> NDArray[Any]:
        with GPU_LOCK:
            return self.place.download(self.value, self.dtype, self.shape)


def _copy_on_gpu(source: int, target: int, size: int) -> None:
    """Copy with the driver, which is always there; the library has no function for it.

    The thread has run or allocated something before, so that the GPU's context is current.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    addresses = ctypes.c_uint64(target), ctypes.c_uint64(source)
    status = driver.cuMemcpyDtoD_v2(*addresses, ctypes.c_size_t(size)) or driver.cuCtxSynchronize()
    if status:
        raise BackendError(f"an array cannot be kept on the GPU: error {status} of the CUDA driver")
