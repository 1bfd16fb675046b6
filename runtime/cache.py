"""Folder of files that may be deleted at any time."""

import os
from pathlib import Path

__all__ = ["CACHE_VARIABLE", "cache_folder"]

CACHE_VARIABLE = "LATENTFORGE_CACHE"
"""Environment variable with the folder of the cache; ``off`` or nothing keeps no files."""


def cache_folder() -> Path | None:
    """Return latentforge's folder for files that may be deleted at any time; None for no cache."""
    given = os.environ.get(CACHE_VARIABLE)
    if given is not None:
        return None if given in ("", "off") else Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "latentforge"
