"""Time of a search, which its parts share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """Clock that runs from when it is made."""

    def __init__(self, budget: float | None) -> None:
        """Start; a budget of None seconds has no end."""
        self._start = time.monotonic()
        self._budget = math.inf if budget is None else budget

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds left, at least 0; infinite without a budget."""
        return max(0.0, self._budget - self.elapsed)

    def affordable(self, share: float, seconds: float, low: int, high: int) -> int:
        """Return how many things of so many seconds fit into a share of the time left.

        At least ``low`` and at most ``high``.
        """
        if math.isinf(self.left):
            return high
        return min(high, max(low, int(share * self.left / max(seconds, 1e-9))))

    def during(self, share: float) -> Callable[[], bool]:
        """Return a function that is True during a share of the time left from now on."""
        end = self.elapsed + share * self.left
        return lambda: self.elapsed < end
