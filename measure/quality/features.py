"""Networks that see pictures as metrics do: as features, as classes, as feature maps.

A network of your own is an ONNX file, see OnnxNetwork. Others only need to be a Network.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.errors import BackendError, SettingsError, ShapeError
from latentforge.runtime.image import to_array
from latentforge.runtime.text import one_line

__all__ = ["Network", "OnnxNetwork", "ImageFeatures", "batches", "load_onnx", "resized", "run_onnx"]
__all__ += ["see"]

Array = NDArray[np.float32]

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """What a network makes of n pictures; empty is what it doesn't give.

    Attributes:
        features: (n, width), what FID, KID and CMMD compare.
        logits: (n, classes), before the softmax, what the Inception score takes.
        maps: each (n, channels, h, w), what perceptual distances compare.
    """

    features: Array | None = None
    logits: Array | None = None
    maps: tuple[Array, ...] = ()


class Network(Protocol):
    """Sees pictures (n, 3, height, width) in -1..1; ``name`` is what results say of it."""

    name: str

    def __call__(self, pictures: Array) -> ImageFeatures:
        """See pictures of any size, all of one."""


class OnnxNetwork:
    """A network in an ONNX file, run by ONNX Runtime on the CPU.

    Its one input is pictures (batch, 3, height, width) in -1..1. Where the file fixes height and
    width, pictures are resized to that, bicubic and antialiased: Parmar et al. (2022), arXiv
    2104.11222. Of its outputs the first of two dimensions is the features, a second one the
    logits, and those of four are feature maps.

    Raises:
        SettingsError: there is no such network.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._session = load_onnx(path, inputs=1)
        given = self._session.get_inputs()[0]
        self._input = given.name
        self._size = [side for side in given.shape[2:] if isinstance(side, int)]

    def __call__(self, pictures: Array) -> ImageFeatures:
        """See pictures (n, 3, height, width) in -1..1."""
        fitting = resized(pictures, *self._size) if len(self._size) == 2 else pictures
        outputs = run_onnx(self._session, {self._input: fitting}, self.name)
        flat = [output for output in outputs if output.ndim == 2]
        return ImageFeatures(
            features=flat[0] if flat else None,
            logits=flat[1] if len(flat) > 1 else None,
            maps=tuple(output for output in outputs if output.ndim == 4),
        )


def load_onnx(path: Path, *, inputs: int) -> Any:
    """A session of an ONNX file that takes so many inputs of pictures.

    Raises:
        SettingsError: there is no such file, or it is another kind of network.
    """
    try:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no base class of their own
        reason = one_line(error)
        raise SettingsError(f"{path} is no network to compare pictures by: {reason}") from error
    shapes = [given.shape for given in session.get_inputs()]
    if len(shapes) != inputs or any(len(shape) != 4 for shape in shapes):
        raise SettingsError(
            f"{path} is no network to compare pictures by: it takes {shapes}, and {inputs} of "
            "(batch, 3, height, width) is expected"
        )
    return session


def run_onnx(session: Any, feeds: Mapping[str, Array], name: str) -> list[Array]:
    """All outputs of a session.

    Raises:
        SettingsError: it does not take pictures of this size or number.
    """
    try:
        outputs: list[Array] = session.run(None, feeds)
    except Exception as error:  # the library's errors share no base class of their own
        reason = one_line(error)
        shape = next(iter(feeds.values())).shape
        raise SettingsError(f"{name} does not take pictures of shape {shape}: {reason}") from error
    return outputs


def resized(pictures: Array, height: int, width: int) -> Array:
    """Pictures (n, 3, height, width), bicubic and antialiased, without rounding to 8 bits."""
    if pictures.shape[2:] == (height, width):
        return pictures
    planes = pictures.reshape(-1, *pictures.shape[2:]).astype(np.float32)
    made = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        for plane in planes
    ]
    return np.stack(made).reshape(*pictures.shape[:2], height, width)


def batches(*galleries: Sequence[Image.Image]) -> Iterator[tuple[Array, ...]]:
    """Pictures of several galleries side by side, some at once, each (n, 3, h, w) in -1..1.

    Raises:
        ShapeError: they are of unequal size or number.
    """
    if len({len(gallery) for gallery in galleries}) != 1:
        counts = " and ".join(str(len(gallery)) for gallery in galleries)
        raise ShapeError(f"{counts} pictures cannot be compared one by one: make as many of each")
    size = galleries[0][0].size if len(galleries[0]) else (0, 0)
    for start in range(0, len(galleries[0]), _BATCH):
        some = [gallery[start : start + _BATCH] for gallery in galleries]
        for picture in (picture for group in some for picture in group):
            if picture.size != size:
                raise ShapeError(
                    f"pictures of {size[0]}x{size[1]} and {picture.width}x{picture.height} "
                    "pixels (width x height) cannot be compared: make all of one size"
                )
        yield tuple(to_array(group) for group in some)


def see(network: Network, gallery: Sequence[Image.Image]) -> ImageFeatures:
    """Features and logits of a whole gallery, without its feature maps.

    Raises:
        BackendError: the network gives NaN or infinity.
        ShapeError: the pictures are of unequal size.
    """
    features, logits = [], []
    for (pictures,) in batches(gallery):
        seen = network(pictures)  # whose feature maps are let go of here
        features.append(seen.features)
        logits.append(seen.logits)
    return ImageFeatures(
        features=_joined(features, f"{network.name}'s features"),
        logits=_joined(logits, f"{network.name}'s logits"),
    )


def _joined(parts: Sequence[Array | None], what: str) -> Array | None:
    given = [part for part in parts if part is not None]
    if not given:
        return None
    whole = np.concatenate(given)
    if not np.isfinite(whole).all():
        raise BackendError(f"{what} of these pictures are not finite: use another network")
    return whole
