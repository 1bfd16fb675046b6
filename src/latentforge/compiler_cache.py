"""Folder of torch's compiler, which torch makes as soon as transformers is imported."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from latentforge.runtime.cleanups import at_forced_end

__all__ = ["private_compiler_cache"]

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def private_compiler_cache() -> Iterator[None]:
    """Give torch's compiler a folder of this command's, unless the user names one.

    Torch's default stays in the temporary folder, under a name that every user of the machine can
    tell, and torch loads pickles from it. The processes that a command starts inherit the folder.
    """
    folder = None
    if _VARIABLE not in os.environ:
        with suppress(OSError):  # there is no temporary folder, which most commands do without
            folder = Path(tempfile.gettempdir()) / f"latentforge-torch-{secrets.token_hex(8)}"
    if folder is None:
        yield
        return
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_VARIABLE] = str(folder)  # torch makes it, if it is used at all
    try:
        with at_forced_end(remove):
            yield
    finally:
        os.environ.pop(_VARIABLE, None)
        remove()
