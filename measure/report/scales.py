"""From figures to places on a drawing, and the round numbers along its edge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Scale", "Tick", "spread", "ticks"]


@dataclass(frozen=True)
class Tick:
    """A round number, or a measured one, and where it lies."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps low..high to start..end; ``logarithmic`` gives equal room to equal ratios."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, here = (
            (math.log(v) for v in (self.low, self.high, value))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        part = (here - low) / (high - low) if high > low else 0.5
        return self.start + part * (self.end - self.start)


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within low..high, about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def spread(values: Sequence[float], *, margin: float = 0.12) -> tuple[float, float]:
    """The range of values with some room around them, also where they are all the same."""
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * margin or 1.0
    return low - room, high + room
