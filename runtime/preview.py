"""Previews without the VAE: clean latents to colours by the linear map of the manifest."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.image import from_array
from latentforge.runtime.manifest import PreviewMap

__all__ = ["colors", "quick_images"]

Array = NDArray[np.float32]


def quick_images(latents: Array, preview: PreviewMap | None) -> list[Image.Image]:
    """Return images of the size of the latents (n, channels, h, w), one pixel for each cell.

    Raises:
        ManifestError: there is no map.
    """
    if preview is None:
        raise ManifestError(
            "these engines have no preview map: export the checkpoint again, or decode a step "
            "with preview()"
        )
    return from_array(colors(latents, preview))


def colors(latents: Array, preview: PreviewMap) -> Array:
    """Return colours (n, 3, h, w) of clean latents (n, channels, h, w), about -1..1."""
    weights = np.array(preview.weights, np.float32)
    offset = np.array(preview.offset, np.float32)
    mapped: Array = np.einsum("kc,nchw->nkhw", weights, latents) + offset[:, None, None]
    return mapped
