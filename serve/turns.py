"""Turns of the batches that run on one replica: which of them does the next step."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Turns"]

_WEIGHT = 0.5  # of the seconds of a batch that came later than another


@dataclass(eq=False)
class _Turn:
    """Seconds that a batch has had, as they count, and how much each further one counts."""

    seconds: float
    weight: float


class Turns:
    """Batches on a replica, which share its time.

    One that comes while another runs gets two thirds of the time, because it is the shorter one,
    and starts with the next step.
    """

    def __init__(self) -> None:
        self._turns: dict[int, _Turn] = {}

    def __len__(self) -> int:
        return len(self._turns)

    def add(self, batch: int) -> None:
        """Add a batch, which starts with the time of those that run."""
        seconds = min((turn.seconds for turn in self._turns.values()), default=0.0)
        self._turns[batch] = _Turn(seconds, _WEIGHT if self._turns else 1.0)

    def remove(self, batch: int) -> None:
        """Remove a batch that has ended."""
        self._turns.pop(batch, None)

    def next(self) -> int:
        """Return the batch that had the least time, of several the last that came.

        Raises:
            ValueError: there is none.
        """
        return min(reversed(self._turns), key=lambda batch: self._turns[batch].seconds)

    def ran(self, batch: int, seconds: float) -> None:
        """Count the seconds that a step of a batch took."""
        turn = self._turns[batch]
        turn.seconds += seconds * turn.weight
