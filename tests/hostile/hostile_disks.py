"""Program that runs a command while another one fills a disk, at the n-th change in a folder."""

import os
import sys
from typing import Any

__all__ = ["PROGRAM", "fill", "fill_at"]

PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from hostile_disks import fill_at
fill_at(sys.argv.pop(1), int(sys.argv.pop(1)))
del sys.path[0]
from latentforge.__main__ import main
sys.exit(main())
"""
"""Arguments: the folder of this file, the folder to fill, the number, and those of the command."""

FILLER = "filler"


def fill(folder: str) -> None:
    """Fill the disk of a folder to the last byte."""
    with open(os.path.join(folder, FILLER), "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass


def fill_at(folder: str, count: int) -> None:
    """Fill the disk before this process's change of a number inside the folder."""
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if seen[0] <= count and _changes(event, arguments, folder):
            seen[0] += 1
            if seen[0] > count:
                fill(folder)

    sys.addaudithook(hook)


def _changes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event not in ("open", "os.mkdir", "shutil.copyfile"):
        return False
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return False
    paths = (os.fspath(path) for path in arguments if isinstance(path, str | os.PathLike))
    return any(os.path.abspath(os.fsdecode(path)).startswith(folder) for path in paths)
