"""Quality gate: thresholds that optimized engines have to reach, checked on measured figures.

comparison.py measures the figures.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.record import Record

__all__ = ["Gate", "Measured"]

Measured = Mapping[str, Mapping[str, float]]
"""Measured figures by component (or ``image``) and metric."""

_RANGES: Mapping[str, tuple[float, float]] = {
    "ssim": (-1, 1),
    "perceptual": (0, math.inf),
    "max_relative_error": (0, math.inf),
}
"""Ranges of figures that have one."""

_UPPER_BOUNDS = ("max_relative_error", "perceptual")
_MAX_IMAGES = 1000


class Gate(Record, frozen=True, kw_only=True):
    """Thresholds of a result against its source at equal seeds; None sets no threshold.

    NaN and images of a single colour are always refused.

    Attributes:
        images: number of images to compare.
        psnr: minimum PSNR in dB over all pixels of all images.
        psnr_worst: minimum PSNR in dB of the worst image.
        ssim: minimum mean SSIM.
        latents_psnr: minimum PSNR in dB of the final latents.
        perceptual: maximum mean perceptual distance, measured with ``network``.
        max_relative_error: maximum relative error of every component's outputs: the largest
            difference as a fraction of the largest output.
        network: ONNX file whose outputs are feature maps of its input, images
            (batch, 3, height, width) in -1..1.
    """

    images: int = 4
    psnr: float | None = None
    psnr_worst: float | None = None
    ssim: float | None = None
    latents_psnr: float | None = None
    perceptual: float | None = None
    max_relative_error: float | None = None
    network: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.images <= _MAX_IMAGES:
            raise SettingsError(
                f"gate: images has to be between 1 and {_MAX_IMAGES}, not {self.images}"
            )
        for name, value in self.thresholds.items():
            low, high = _RANGES.get(name, (-math.inf, math.inf))
            if not low <= value <= high:  # False for NaN, which no figure reaches
                raise SettingsError(f"gate: {name} has to be from {low:g} to {high:g}, not {value}")
        if self.perceptual is not None and self.network is None:
            raise SettingsError("gate: perceptual needs a network: an ONNX file of feature maps")

    @property
    def thresholds(self) -> dict[str, float]:
        """Thresholds that are set, by metric."""
        values = {name: getattr(self, name) for name in _METRICS}
        return {name: value for name, value in values.items() if value is not None}

    def with_overrides(self, overrides: Iterable[str]) -> "Gate":
        """Return the gate with some values replaced, each written as ``NAME=VALUE``.

        Raises:
            SettingsError: an unknown name, or a value of the wrong type or range.
        """
        names = ("images", *_METRICS, "network")
        changes: dict[str, object] = {}
        for override in overrides:
            name, sign, value = override.partition("=")
            if not sign or name not in names:
                raise SettingsError(
                    f"no gate {override!r}: expected NAME=VALUE with a NAME of {', '.join(names)}"
                )
            changes[name] = value
        try:
            return msgspec.convert({**msgspec.to_builtins(self), **changes}, Gate, strict=False)
        except msgspec.ValidationError as error:
            raise SettingsError(f"gate: {error}") from error

    def failures(self, measured: Measured) -> Iterator[str]:
        """Describe each threshold that is not reached; a NaN or missing figure is a failure."""
        for metric, threshold in self.thresholds.items():
            of_images = metric != "max_relative_error"
            for part in (part for part in measured if (part == "image") == of_images):
                value = measured[part].get(metric, float("nan"))
                upper = metric in _UPPER_BOUNDS
                if not (value <= threshold if upper else value >= threshold):
                    bound = "at most" if upper else "at least"
                    yield f"{part}: {metric} is {value:.4g} and has to be {bound} {threshold:g}"


_METRICS = ("psnr", "psnr_worst", "ssim", "latents_psnr", "perceptual", "max_relative_error")
