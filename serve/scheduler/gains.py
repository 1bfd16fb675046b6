"""Gains of batches: how many images are worth running together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["BatchGains"]

_WORTH = 1.1  # images per second of a batch, over those of one half as large


@dataclass(frozen=True, kw_only=True)
class BatchGains:
    """Measured images per second by batch size, for each model and image size.

    Attributes:
        rates: by (model, height, width) and then by batch size; the sizes double from 1.
    """

    rates: Mapping[tuple[str, int, int], Mapping[int, float]] = field(default_factory=dict)

    def measured(
        self, model: str, height: int, width: int, rates: Mapping[int, float]
    ) -> BatchGains:
        """Return these gains, and the rates of a further size of image."""
        return BatchGains(rates={**self.rates, (model, height, width): dict(rates)})

    def below(self, size: int, model: str, height: int, width: int) -> BatchGains:
        """Return these gains, with batches of fewer images than ``size`` for this size of image."""
        rates = self._nearest(model, height * width)
        smaller = {number: rate for number, rate in rates.items() if number < size}
        return self.measured(model, height, width, smaller)

    def batch_size(self, model: str, height: int, width: int) -> int:
        """Return the largest batch that is at least a tenth faster than one half as large.

        Images of a size that was not measured gain as the next larger one that was, or as the
        largest. Nothing is worth more than 1 before it is measured.
        """
        rates = self._nearest(model, height * width)
        size = 1
        while rates.get(2 * size, 0.0) >= _WORTH * rates.get(size, float("inf")):
            size *= 2
        return size

    def _nearest(self, model: str, pixels: int) -> Mapping[int, float]:
        measured = {
            height * width: rates
            for (name, height, width), rates in self.rates.items()
            if name == model
        }
        larger = [size for size in measured if size >= pixels]
        size = min(larger) if larger else max(measured, default=0)
        return measured.get(size, {})
