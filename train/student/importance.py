"""Importance of groups, heads and channels inside a UNet's blocks."""

from torch import Tensor

__all__ = ["highest"]


def highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the highest scores (n,), in rising order; the first of equal ones."""
    order = scores.argsort(descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))
