"""The recipes that come with the package: one TOML file each, by its name."""

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
    """What there is."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(file.name[:-5] for file in files if file.name.endswith(".toml")))


def text(name: str) -> str:
    """A recipe as it was written."""
    return resources.files(__package__).joinpath(f"{name}.toml").read_text("utf-8")


def summary(name: str) -> str:
    """What a recipe is for, in a line."""
    data: Mapping[str, Any] = tomllib.loads(text(name))
    return str(data["summary"])
