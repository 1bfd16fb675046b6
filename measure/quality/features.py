"""Networks that extract features, class logits and feature maps from images.

A custom network is an ONNX file (OnnxNetwork), or any object with the protocol Network.
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
from latentforge.runtime.files import open_regular
from latentforge.runtime.image import to_array
from latentforge.runtime.text import one_line

__all__ = [
    "Network",
    "OnnxNetwork",
    "ImageFeatures",
    "batches",
    "extract",
    "load_onnx",
    "resized",
    "run_onnx",
]

Array = NDArray[np.float32]

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """Outputs of a network for n images; None or empty where it has no such output.

    Attributes:
        features: (n, width), for FID, KID and CMMD.
        logits: (n, classes) before the softmax, for the Inception score.
        maps: each (n, channels, h, w), for perceptual distances.
    """

    features: Array | None = None
    logits: Array | None = None
    maps: tuple[Array, ...] = ()


class Network(Protocol):
    """Network over images (n, 3, height, width) in -1..1; ``name`` stands in results."""

    name: str

    def __call__(self, images: Array) -> ImageFeatures:
        """Return the features of images, all of one size."""


class OnnxNetwork:
    """Network in an ONNX file, run by ONNX Runtime on the CPU.

    Its only input is images (batch, 3, height, width) in -1..1. Where the file fixes height and
    width, images are resized to them, bicubic and antialiased: Parmar et al. (2022), arXiv
    2104.11222. The first output of rank 2 holds the features, the second the logits; outputs of
    rank 4 are feature maps.

    Raises:
        SettingsError: there is no such network.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._session = load_onnx(path, inputs=1)
        given = self._session.get_inputs()[0]
        self._input = given.name
        self._size = [side for side in given.shape[2:] if isinstance(side, int)]

    def __call__(self, images: Array) -> ImageFeatures:
        """Return the features of images (n, 3, height, width) in -1..1."""
        fitting = resized(images, *self._size) if len(self._size) == 2 else images
        outputs = run_onnx(self._session, {self._input: fitting}, self.name)
        flat = [output for output in outputs if output.ndim == 2]
        return ImageFeatures(
            features=flat[0] if flat else None,
            logits=flat[1] if len(flat) > 1 else None,
            maps=tuple(output for output in outputs if output.ndim == 4),
        )


def load_onnx(path: Path, *, inputs: int) -> Any:
    """Open an ONNX file whose ``inputs`` inputs are all images.

    Raises:
        SettingsError: the file is missing, or is another kind of network.
    """
    try:
        open_regular(path).close()  # a pipe would block the library
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no base class of their own
        raise SettingsError(
            f"{path} is not a network for comparing images: {one_line(error)}"
        ) from error
    shapes = [given.shape for given in session.get_inputs()]
    if len(shapes) != inputs or any(len(shape) != 4 for shape in shapes):
        raise SettingsError(
            f"{path} is not a network for comparing images: its inputs are {shapes}, expected "
            f"{inputs} of (batch, 3, height, width)"
        )
    return session


def run_onnx(session: Any, feeds: Mapping[str, Array], name: str) -> list[Array]:
    """Return all outputs of a session.

    Raises:
        SettingsError: it does not accept images of this size or number.
    """
    try:
        outputs: list[Array] = session.run(None, feeds)
    except Exception as error:  # the library's errors share no base class of their own
        shape = next(iter(feeds.values())).shape
        raise SettingsError(
            f"{name} does not accept images of shape {shape}: {one_line(error)}"
        ) from error
    return outputs


def resized(images: Array, height: int, width: int) -> Array:
    """Resize images (n, 3, h, w), bicubic and antialiased, without rounding to 8 bits."""
    if images.shape[2:] == (height, width):
        return images
    planes = images.reshape(-1, *images.shape[2:]).astype(np.float32)
    made = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        for plane in planes
    ]
    return np.stack(made).reshape(*images.shape[:2], height, width)


def batches(*galleries: Sequence[Image.Image]) -> Iterator[tuple[Array, ...]]:
    """Yield batches of several galleries side by side, each (n, 3, h, w) in -1..1.

    Raises:
        ShapeError: the images are of unequal size or number.
    """
    if len({len(gallery) for gallery in galleries}) != 1:
        counts = " and ".join(str(len(gallery)) for gallery in galleries)
        raise ShapeError(f"{counts} images cannot be compared pair by pair: generate equally many")
    size = galleries[0][0].size if len(galleries[0]) else (0, 0)
    for start in range(0, len(galleries[0]), _BATCH):
        groups = [gallery[start : start + _BATCH] for gallery in galleries]
        for image in (image for group in groups for image in group):
            if image.size != size:
                raise ShapeError(
                    f"images of {size[0]}x{size[1]} and {image.width}x{image.height} "
                    "pixels (width x height) cannot be compared: generate all at one size"
                )
        yield tuple(to_array(group) for group in groups)


def extract(network: Network, gallery: Sequence[Image.Image]) -> ImageFeatures:
    """Return the features and logits of a whole gallery, without its feature maps.

    Raises:
        BackendError: the network gives NaN or infinity.
        ShapeError: the images are of unequal size.
    """
    features, logits = [], []
    for (images,) in batches(gallery):
        output = network(images)  # its feature maps are freed here
        features.append(output.features)
        logits.append(output.logits)
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
        raise BackendError(f"{what} of these images are not finite: use another network")
    return whole
