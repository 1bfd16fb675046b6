"""Definition of an equal image: class A of the two classes of speed."""

import math
from collections.abc import Mapping
from typing import Any

from latentforge.runtime.image import SAME_IMAGE_PSNR
from latentforge.runtime.manifest import Manifest

__all__ = ["engine_psnr", "required_psnr", "same_trajectory"]


def same_trajectory(manifest: Manifest) -> bool:
    """Return True if the engines are meant to reproduce the checkpoint's own image (class A).

    Half precision may round. Quantization and pruning change the image (class B).
    """
    settings = [stage.options.get("settings", {}) for stage in manifest.history]
    precisions = {component.precision for component in manifest.components.values()}
    return precisions <= SAME_IMAGE_PSNR.keys() and not any(map(_prunes, settings))


def required_psnr(settings: Mapping[str, Any]) -> float:
    """Return the PSNR in dB from which the images of an optimize stage are class A.

    Args:
        settings: of the recipe, as an ``optimize`` stage records them.

    Returns:
        The threshold; infinity for settings that are meant to change the image.
    """
    precisions = set(settings.get("precision", {}).values()) or {"fp32"}
    if _prunes(settings) or not precisions <= SAME_IMAGE_PSNR.keys():
        return math.inf
    return min(SAME_IMAGE_PSNR[precision] for precision in precisions)


def engine_psnr(precisions: str) -> float:
    """Return the PSNR in dB from which images that engines compute are class A.

    Args:
        precisions: of the engines, with commas between them, such as ``bf16, fp16``. Where one of
            them is unknown, that of fp32 is required.
    """
    names = precisions.split(", ")
    known = all(name in SAME_IMAGE_PSNR for name in names)
    return min(SAME_IMAGE_PSNR[name] for name in (names if known else ["fp32"]))


def _prunes(settings: Any) -> bool:
    return isinstance(settings, Mapping) and bool(settings.get("prune"))
