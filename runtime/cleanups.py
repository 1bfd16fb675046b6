"""Cleanups of a process that is ended by force, because a library's call does not return.

``finally`` blocks do not run then. Code that makes a temporary folder or starts a process
registers the removal here, for as long as it lasts.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from latentforge.runtime.disk import naming_full_disk

__all__ = ["at_forced_end", "clean_up", "temporary_folder"]

_CLEANUPS: dict[object, Callable[[], object]] = {}


@contextmanager
def at_forced_end(cleanup: Callable[[], object]) -> Iterator[None]:
    """Register a cleanup while the block runs; the block itself does not call it.

    It is called from another thread, and must not wait for the one that runs the block.
    """
    key = object()
    _CLEANUPS[key] = cleanup
    try:
        yield
    finally:
        del _CLEANUPS[key]


def clean_up() -> None:
    """Call the registered cleanups, latest first; one that fails does not keep the others."""
    for cleanup in reversed(tuple(_CLEANUPS.values())):
        with suppress(Exception):
            cleanup()


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Make a folder in the system's temporary folder, and delete it after the block."""
    with (
        tempfile.TemporaryDirectory(prefix=prefix) as name,
        at_forced_end(partial(shutil.rmtree, name, ignore_errors=True)),
        naming_full_disk(Path(name), advice="set TMPDIR to another folder"),
    ):
        yield Path(name)
