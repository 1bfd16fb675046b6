"""Constants and Casts in half precision."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["cast_node", "fits", "half_initializer"]

_LARGEST = float(np.finfo(np.float16).max)
_INFINITE = 1e30  # larger numbers stand for infinity, as in masks
_LOSS = 1e-3  # relative to the norm: rounding alone costs at most 2 ** -11


def fits(array: NDArray[np.float32], *, clamp: bool = False) -> bool:
    """Return True if half precision can represent an array.

    It cannot if a value is beyond 65504, or if so much of the array is below 6e-5, where half
    loses digits, that its norm changes by a thousandth.

    Args:
        array: the values.
        clamp: ignore values from 1e30 on, which stand for infinity.
    """
    sizes = np.abs(array)
    if not (sizes <= _LARGEST).all():
        if not clamp or ((sizes > _LARGEST) & (sizes < _INFINITE)).any():
            return False
        array = array[sizes <= _LARGEST]
    lost = array - array.astype(np.float16).astype(np.float32)
    return bool(np.linalg.norm(lost) <= _LOSS * np.linalg.norm(array))


def half_initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Return a half initializer that is rounded when it is read: large models stay on disk."""

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(_rounded(tensor.numpy()), name=name)

    shape = ir.Shape(tensor.shape.numpy())
    lazy = ir.LazyTensor(evaluate, ir.DataType.FLOAT16, shape, name=name)
    return ir.Value(
        name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT16), const_value=lazy
    )


def _rounded(array: NDArray[np.generic]) -> NDArray[np.float16]:
    """Return an array in half; numbers that stand for infinity become the largest of half."""
    wide = np.asarray(array, np.float32)
    finite = np.where(np.isfinite(wide), wide.clip(-_LARGEST, _LARGEST), wide)
    return finite.astype(np.float16)


def cast_node(source: ir.Value, dtype: ir.DataType, name: str, output: str) -> ir.Node:
    """Return a Cast of a value with a named output; it is in no graph yet."""
    value = ir.Value(name=output, shape=source.shape, type=ir.TensorType(dtype))
    return ir.node("Cast", [source], attributes={"to": dtype}, outputs=[value], name=name)
