"""Classifier-free guidance: rows that the denoiser runs for each image, and how they are mixed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Guidance", "rescale_guidance"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance by prompts, and by an image where the denoiser takes one.

    The rows of the positive prompts are last, so that they are the ones that remain at noise levels
    without guidance:

        rows   prompt      image
        1      positive    given
        2      negative    given
               positive    given
        3      negative    zeros
               negative    given
               positive    given

    Attributes:
        rows: rows per image.
        scale: guidance scale w of Ho and Salimans (2022), equation 6; 1 has no effect.
        image_scale: image guidance scale of Brooks et al. (2023), arXiv 2211.09800, equation 3; 1
            has no effect, and only three rows tell it apart from that.
        rescale: phi of Lin et al. (2023), arXiv 2305.08891, equation 16; 0 has no effect.
    """

    rows: int = 1
    scale: float = 1.0
    image_scale: float = 1.0
    rescale: float = 0.0

    def repeat(self, images: Array | None) -> Array | None:
        """Return channels from images (images, ...) for all rows, (rows * images, ...)."""
        if images is None:
            return None
        groups = [images] * self.rows
        if self.rows == 3:
            groups[0] = np.zeros_like(images)
        return np.concatenate(groups)

    def mix(self, output: Array) -> Array:
        """Return the guided output (images, channels, h, w) of outputs of all rows."""
        *others, negative, positive = np.split(output, self.rows)
        mixed = negative + self.scale * (positive - negative)
        for blind in others:
            mixed = mixed + (self.image_scale - 1) * (negative - blind)
        return rescale_guidance(mixed, positive, self.rescale) if self.rescale else mixed


def rescale_guidance(mixed: Array, positive: Array, phi: float) -> Array:
    """Rescale a guided output towards the standard deviation of the positive output.

    Lin et al. (2023), arXiv 2305.08891, equations 14 to 16; per sample.

    Args:
        mixed: output with guidance, (batch, channels, h, w).
        positive: output for the positive prompts, of the same shape.
        phi: 0 leaves `mixed` unchanged, 1 gives it the standard deviation of `positive`.
    """
    axes = tuple(range(1, mixed.ndim))
    target, present = (a.std(axis=axes, keepdims=True) for a in (positive, mixed))
    ratio: Array = np.divide(target, present, out=np.ones_like(present), where=present > 0)
    return mixed * (phi * ratio + (1 - phi))
