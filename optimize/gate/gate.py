"""The thresholds that a result has to reach, and the verdict on what was measured."""

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.record import Record

__all__ = ["Gate", "Measured"]

Measured = Mapping[str, Mapping[str, float]]
"""Figures by component, or ``image``, and metric."""

_AT_MOST = ("max_relative_error", "perceptual")
_MOST_IMAGES = 1000


class Gate(Record, frozen=True, kw_only=True):
    """What a result has to reach against its input, at equal seeds. None asks for nothing.

    NaN and pictures of a single colour are refused whatever is asked for.

    Attributes:
        images: how many are compared.
        psnr: at least, in dB, over all pixels of all images.
        psnr_worst: at least, in dB, of the worst image.
        ssim: at least, on average.
        latents_psnr: at least, in dB, of the final latents.
        perceptual: at most, on average, by ``network``.
        max_relative_error: at most, of every component's outputs: the largest difference as a
            fraction of the largest output.
        network: an ONNX file whose outputs are feature maps of its input, pictures
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
        if not 1 <= self.images <= _MOST_IMAGES:
            raise SettingsError(f"gate: images is a number from 1 to {_MOST_IMAGES}")
        if self.perceptual is not None and self.network is None:
            raise SettingsError("gate: perceptual needs a network: an ONNX file of feature maps")

    @property
    def thresholds(self) -> dict[str, float]:
        """Those that are set, by metric."""
        given = {name: getattr(self, name) for name in _METRICS}
        return {name: value for name, value in given.items() if value is not None}

    def changed(self, settings: Iterable[str]) -> "Gate":
        """The gate with some values replaced, each given as ``NAME=VALUE``.

        Raises:
            SettingsError: no such name, or no number.
        """
        known = ("images", *_METRICS, "network")
        changes: dict[str, object] = {}
        for setting in settings:
            name, sign, value = setting.partition("=")
            if not sign or name not in known:
                raise SettingsError(f"no gate {setting!r}: it is NAME=VALUE, of {', '.join(known)}")
            changes[name] = value
        try:
            return msgspec.convert({**msgspec.to_builtins(self), **changes}, Gate, strict=False)
        except msgspec.ValidationError as error:
            raise SettingsError(f"gate: {error}") from error

    def failures(self, measured: Measured) -> Iterator[str]:
        """What is not reached, each in a few words. A metric that is NaN or missing isn't."""
        for metric, threshold in self.thresholds.items():
            of_images = metric != "max_relative_error"
            for part in (part for part in measured if (part == "image") == of_images):
                value = measured[part].get(metric, float("nan"))
                most = metric in _AT_MOST
                if not (value <= threshold if most else value >= threshold):
                    bound = "at most" if most else "at least"
                    yield f"{part}: {metric} is {value:.4g} and has to be {bound} {threshold:g}"


_METRICS = ("psnr", "psnr_worst", "ssim", "latents_psnr", "perceptual", "max_relative_error")
