"""Gate of an acceleration plan: thresholds on its images and on the accuracy that it may lose."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from latentforge.optimize.gate.gate import Gate
from latentforge.runtime.errors import SettingsError

__all__ = ["DEFAULT_GATE", "PlanGate", "unaccelerated_name"]

DEFAULT_GATE = "psnr=20"
"""Gate of a plan if the request has none; the int8 recipe has the same threshold."""

_IMAGES_OF_ACCURACIES = (
    128  # with fewer, a single image is worth about one percentage point or more
)


def unaccelerated_name(accuracy: str) -> str:
    """Return the name of the figure that holds the unaccelerated engines' value of an accuracy."""
    return f"{accuracy}_unaccelerated"


@dataclass(frozen=True, kw_only=True)
class PlanGate:
    """Thresholds that the images of a plan have to reach.

    Attributes:
        images: thresholds relative to the images of the unaccelerated engines, at equal seeds.
        max_loss: percentage points that an accuracy may lose, by its name.
    """

    images: Gate
    max_loss: Mapping[str, float]

    @classmethod
    def parse(
        cls,
        settings: Sequence[str],
        *,
        network: str | None = None,
        accuracies: Collection[str] = (),
    ) -> PlanGate:
        """Parse a gate.

        Args:
            settings: thresholds as NAME=VALUE: fields of Gate, and names of accuracies.
            network: of the perceptual distance, see Gate.
            accuracies: names of the accuracies that can be measured.

        Raises:
            SettingsError: an unknown name, or not a number in its range.
        """
        of_accuracies = [text for text in settings if text.partition("=")[0] in accuracies]
        max_loss = {
            name: _points(name, value)
            for name, _, value in (text.partition("=") for text in of_accuracies)
        }
        images = _IMAGES_OF_ACCURACIES if max_loss else Gate().images
        try:
            gate = Gate(images=images, network=network).with_overrides(
                text for text in settings if text not in of_accuracies
            )
        except SettingsError as error:
            raise SettingsError(f"{error}{_also(accuracies)}") from error
        if gate.max_relative_error is not None:
            raise SettingsError(
                "max_relative_error compares engines, not images: for a plan use psnr, ssim, "
                "latents_psnr or perceptual"
            )
        if not gate.thresholds and not max_loss:
            gate = gate.with_overrides([DEFAULT_GATE])
        return cls(images=gate, max_loss=max_loss)

    def failures(self, figures: Mapping[str, float]) -> Iterator[str]:
        """Yield one short message for each threshold that the figures of a plan miss."""
        yield from self.images.failures({"image": figures})
        for name, allowed in self.max_loss.items():
            lost = 100 * (figures[unaccelerated_name(name)] - figures[name])
            if not lost <= allowed + 1e-9:
                yield f"image: {name} loses {lost:.3g} points and may lose {allowed:g}"

    def __str__(self) -> str:
        thresholds = [f"{name} {value:g}" for name, value in self.images.thresholds.items()]
        losses = [f"{name} within {value:g} points" for name, value in self.max_loss.items()]
        return ", ".join([*thresholds, *losses])


def _points(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise SettingsError(
            f"gate: {name} is the loss allowed, in percentage points from 0 to 100, not {value}"
        )
    return number


def _also(accuracies: Collection[str]) -> str:
    return f"; for this checkpoint also {' and '.join(accuracies)}" if accuracies else ""
