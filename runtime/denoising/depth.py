"""Depth maps as a channel of the denoiser's sample: resized and normalized as diffusers does."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.errors import SettingsError, ShapeError

__all__ = ["DepthInput", "depth_channel"]

Array = NDArray[np.float32]
DepthInput: TypeAlias = "Image.Image | Sequence[Image.Image] | NDArray[Any]"
"""Depth map: one for all prompts, one per prompt, or an array (maps, height, width)."""

_CUBIC = -0.75  # Keys' parameter a, as torch has it
_FLOATS = ("F", "I", "I;16", "I;16B", "I;16L")  # modes of more than 8 bits


def depth_channel(depth_map: DepthInput, *, height: int, width: int) -> Array:
    """Return depth maps as a channel (maps, 1, height, width) in -1..1.

    Their unit does not matter, since each is scaled to that range.

    Args:
        depth_map: as given by the user.
        height, width: of the latents.

    Raises:
        SettingsError: it is not a depth map, or one holds a single value or NaN.
        ShapeError: an array has another number of dimensions.
    """
    rows = [_resized(array, height, width) for array in _arrays(depth_map)]
    return np.stack([_normalized(row) for row in rows])[:, None].astype(np.float32)


def _arrays(depth_map: DepthInput) -> list[NDArray[np.float64]]:
    if isinstance(depth_map, np.ndarray):
        if depth_map.ndim != 3 or 0 in depth_map.shape:
            raise ShapeError(
                f"depth_map must be (maps, height, width), not of shape {depth_map.shape}"
            )
        if depth_map.dtype.kind not in "fiu":
            raise SettingsError(f"depth_map must hold numbers, not {depth_map.dtype}")
        return list(depth_map.astype(np.float64))
    maps = [depth_map] if isinstance(depth_map, Image.Image) else depth_map
    if not isinstance(maps, Sequence) or not maps:
        raise SettingsError(f"depth_map must be a PIL image, not {type(depth_map).__name__}")
    return [_array(item) for item in maps]


def _array(depth_map: Image.Image) -> NDArray[np.float64]:
    if not isinstance(depth_map, Image.Image):
        raise SettingsError(f"depth_map must be a PIL image, not {type(depth_map).__name__}")
    grey = depth_map if depth_map.mode in _FLOATS else depth_map.convert("L")
    return np.asarray(grey, np.float64)


def _resized(array: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    rows, columns = _cubic(array.shape[0], height), _cubic(array.shape[1], width)
    return rows @ array @ columns.T


def _cubic(size: int, target: int) -> NDArray[np.float64]:
    """Return the matrix (target, size) of bicubic interpolation, without antialiasing.

    Keys (1981), as torch.nn.functional.interpolate(mode="bicubic", align_corners=False) has it.
    """
    places = (np.arange(target) + 0.5) * (size / target) - 0.5
    nearest = np.floor(places).astype(int)
    matrix = np.zeros((target, size))
    for offset in range(-1, 3):
        taps = nearest + offset
        columns = np.clip(taps, 0, size - 1)
        np.add.at(matrix, (np.arange(target), columns), _kernel(np.abs(places - taps)))
    return matrix


def _kernel(x: NDArray[np.float64]) -> NDArray[np.float64]:
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * x * _CUBIC - 4 * _CUBIC
    return np.where(x <= 1, near, far)


def _normalized(array: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = array.min(), array.max()
    if not high > low:  # also true for NaN
        raise SettingsError("the depth map has a single value or NaN: give one with some relief")
    normalized: NDArray[np.float64] = 2 * (array - low) / (high - low) - 1
    return normalized
