"""Axes of charts: mapping of values to coordinates, and round tick values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Scale", "Tick", "padded_range", "ticks"]


@dataclass(frozen=True)
class Tick:
    """Tick mark: its coordinate and its label."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Mapping of the values low..high to the coordinates start..end, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value."""
        low, high, position = (
            (math.log(v) for v in (self.low, self.high, value))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        fraction = (position - low) / (high - low) if high > low else 0.5
        return self.start + fraction * (self.end - self.start)


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return about ``count`` multiples of 1, 2 or 5 times a power of ten within low..high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def padded_range(values: Sequence[float], *, margin: float = 0.12) -> tuple[float, float]:
    """Return the range of values with a margin on both sides; equal values get a margin too."""
    low, high = min(values), max(values)
    padding = (high - low) * margin or abs(high) * margin or 1.0
    return low - padding, high + padding
