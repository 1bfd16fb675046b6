"""What pruning took out, for reports."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Removed"]


@dataclass(frozen=True, kw_only=True)
class Removed:
    """A part of a network that was removed.

    Attributes:
        kind: of part: a residual branch, hidden channels of an MLP, heads of an attention.
        name: of the module.
        score: what removing it was estimated to cost; comparable among parts of a kind.
        parameters: how many weights went with it.
    """

    kind: Literal["block", "channels", "heads"]
    name: str
    score: float
    parameters: int
