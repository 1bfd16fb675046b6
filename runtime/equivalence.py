"""Definition of "same picture": class A of the two classes of speed."""

import math
from collections.abc import Mapping
from typing import Any

from latentforge.runtime.manifest import Manifest

__all__ = ["SAME_PICTURE", "required_psnr", "same_trajectory"]

SAME_PICTURE: Mapping[str, float] = {"fp32": 40.0, "fp16": 30.0}
"""PSNR in dB from which a picture counts as the same, by precision."""


def same_trajectory(manifest: Manifest) -> bool:
    """Return True if the engines are meant to draw the checkpoint's own picture (class A).

    Half precision may round; quantized numbers and pruned weights draw another picture (class B).
    """
    settings = [stage.options.get("settings", {}) for stage in manifest.history]
    precisions = {component.precision for component in manifest.components.values()}
    return precisions <= SAME_PICTURE.keys() and not any(map(_prunes, settings))


def required_psnr(settings: Mapping[str, Any]) -> float:
    """Return the PSNR in dB from which an optimize stage's pictures are class A.

    It is infinite for settings that are meant to draw another picture.

    Args:
        settings: of the recipe, as an ``optimize`` stage records them.
    """
    precisions = set(settings.get("precision", {}).values()) or {"fp32"}
    if _prunes(settings) or not precisions <= SAME_PICTURE.keys():
        return math.inf
    return min(SAME_PICTURE[precision] for precision in precisions)


def _prunes(settings: Any) -> bool:
    return isinstance(settings, Mapping) and bool(settings.get("prune"))
