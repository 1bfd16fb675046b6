"""Accuracy metrics of the demo checkpoint, whose prompts say what an image has to show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.text import one_line

if TYPE_CHECKING:
    from latentforge.measure.quality.inputs import Accuracy, Gallery

__all__ = ["demo_accuracies"]


def demo_accuracies(
    checkpoint: str, prompts: Sequence[str], package: Path | None
) -> dict[str, Accuracy]:
    """Return the accuracies that can be computed for a checkpoint's images, by metric.

    Args:
        checkpoint: as the manifest names it; only ``demo`` has accuracies.
        prompts: of the images, each of the form "NAME on a COLOR background".
        package: the unpacked npm package of the demo's training images, which ``retrieval`` needs.

    Returns:
        ``colour`` (images whose border has the named colour) and, with the package,
        ``retrieval`` (images nearest to the training image of the named object); nothing for other
        checkpoints or prompts.

    Raises:
        SettingsError: the package does not hold the training images.
    """
    from latentforge.export.checkpoint import DEMO

    if checkpoint != DEMO:
        return {}
    from latentforge.export.demo import score

    try:
        for prompt in prompts:
            score.parse(prompt)
    except ValueError:
        return {}

    def colour(gallery: Gallery, texts: Sequence[str]) -> int:
        pairs = zip(gallery, texts, strict=True)
        return sum(score.border(image) == score.parse(text)[1] for image, text in pairs)

    if package is None:
        return {"colour": colour}
    originals = _training_images(package)

    def retrieval(gallery: Gallery, texts: Sequence[str]) -> int:
        return score.score(gallery, texts, originals).names

    return {"colour": colour, "retrieval": retrieval}


def _training_images(package: Path) -> NDArray[np.uint8]:
    from latentforge.export.demo.data import pictures

    try:
        return pictures(package)
    except Exception as error:  # any structure of JSON, and any damage of pictures
        raise SettingsError(
            f"{package} does not hold the demo's training images: {one_line(error)}; unpack "
            "emoji-datasource-google 16.0.0 and name its folder package"
        ) from error
