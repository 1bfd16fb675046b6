"""Recipes that ship with the package: one TOML file each, named after the recipe."""

import sys
from collections.abc import Mapping
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["names", "summary", "text", "tomllib"]


def names() -> tuple[str, ...]:
    """Return the names of all recipes that ship with the package, in alphabetical order."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(file.name[:-5] for file in files if file.name.endswith(".toml")))


def text(name: str) -> str:
    """Return the TOML text of a recipe."""
    return resources.files(__package__).joinpath(f"{name}.toml").read_text("utf-8")


def summary(name: str) -> str:
    """Return the one-line summary of a recipe."""
    data: Mapping[str, Any] = tomllib.loads(text(name))
    return str(data["summary"])
