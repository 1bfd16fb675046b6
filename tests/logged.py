"""A function that other processes call by its name."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["logged"]


def logged(log: Path, function: Callable[..., object], *arguments: object) -> None:
    """Call a function with standard error in a file, from then on."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    function(*arguments)
