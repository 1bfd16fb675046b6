"""Previews without the VAE: clean latents to colours, by the map of the manifest."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.image import from_array
from latentforge.runtime.manifest import PreviewMap

__all__ = ["colors", "features", "quick_images"]

Array = NDArray[np.float32]


def quick_images(latents: Array, preview: PreviewMap | None) -> list[Image.Image]:
    """Return images of the size of the latents (n, channels, h, w), one pixel for each cell.

    Raises:
        ManifestError: there is no map.
    """
    if preview is None:
        raise ManifestError(
            "these engines have no map for previews: export the checkpoint again, or decode a "
            "step with preview()"
        )
    return from_array(colors(latents, preview))


def colors(latents: Array, preview: PreviewMap) -> Array:
    """Return colours (n, 3, h, w) of clean latents (n, channels, h, w), about -1..1."""
    products = bool(preview.products[0])
    rows = [
        (*linear, *square) for linear, square in zip(preview.weights, preview.products, strict=True)
    ]
    mapped: Array = np.einsum(
        "kc,nchw->nkhw", np.array(rows, np.float32), features(latents, products=products)
    )
    return mapped + np.array(preview.offset, np.float32)[:, None, None]


def features(latents: Array, *, products: bool) -> Array:
    """Return latents (n, channels, h, w), and after them the products of each two channels.

    The products of a channel, with itself and with those after it, follow those of the one before.
    """
    if not products:
        return latents
    channels = range(latents.shape[1])
    pairs = [latents[:, each : each + 1] * latents[:, each:] for each in channels]
    return np.concatenate([latents, *pairs], axis=1)
