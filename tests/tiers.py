"""Two tiers of tests: `make test` in minutes, and what it leaves to `make thorough`."""

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["further", "tiered"]

FURTHER = (
    *("decidiffusion-2", "lcm", "sd-2", "sd-turbo", "ssd-1b", "sdxl-turbo", "sdxl-inpainting"),
    *("sdxl-pix2pix", "sdxl-refiner"),
)
"""Families whose mechanisms others have too."""


def further(*values: Any) -> list[Any]:
    """Return values of a test's parameter, or tuples of several's, left to `make thorough`."""
    tuples = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*values, marks=pytest.mark.thorough) for values in tuples]


def tiered(families: Iterable[str]) -> list[Any]:
    """Return a test's families, the further ones left to `make thorough`."""
    return [value for name in families for value in (further(name) if name in FURTHER else [name])]
