"""Version of the manifest format, and the refusal of directories of other versions."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.text import printable
from latentforge.runtime.version import __version__

__all__ = ["FORMAT", "check_format"]

FORMAT = 2
"""The one format that this release reads and writes."""

_MAX_CHECKPOINT = 200  # characters
_OPTION_VALUE = re.compile(r"[a-z][a-z0-9-]{0,39}", re.ASCII)
_BUILD_DEFAULTS = {"target": "cpu", "recipe": "fp32"}  # of latentforge build


def check_format(path: Path, content: bytes, number: int) -> None:
    """Check that the manifest at path has, with format `number`, the one that this release reads.

    Raises:
        ManifestError: it has another format. The message names the command that builds an older
            directory anew, as its content tells, or says to install a newer release.
    """
    if number == FORMAT:
        return
    shown = number if abs(number) < 10**9 else "unknown"
    reads = f"but latentforge {__version__} reads format {FORMAT}"
    problem = f"{printable(str(path))} has format {shown}, {reads}"
    if number > FORMAT:
        raise ManifestError(f"{problem}: install the newer latentforge that wrote it")
    if number < 1:
        raise ManifestError(f"{problem}: there is no such format; export again")
    command = _rebuild_command(json.loads(content), path.parent)
    raise ManifestError(f"{problem}: build it again with `{command}`")


def _rebuild_command(manifest: Any, directory: Path) -> str:
    """Return the command that makes a format 1 directory anew, as far as its manifest tells.

    Nothing has checked this JSON against format 1, so every key may be missing and every value
    may have any type.
    """
    history = _get(manifest, "history")
    entries = history if isinstance(history, list) else []
    names = ((_get(entry, "name"), _get(entry, "options")) for entry in entries)
    stages = {name: options for name, options in names if isinstance(name, str)}
    checkpoint = _checkpoint(_get(_get(manifest, "source"), "checkpoint"))
    words = [checkpoint, shlex.quote(printable(str(directory)))]
    if stages and stages.keys() <= {"export", "import"}:
        return " ".join(["latentforge export", *words, "--overwrite"])
    for name, default in _BUILD_DEFAULTS.items():
        value = _get(stages.get("optimize"), name)
        if isinstance(value, str) and _OPTION_VALUE.fullmatch(value) and value != default:
            words += [f"--{name}", value]
    if isinstance(_get(manifest, "fast"), dict):
        words.append("--fast")
    return " ".join(["latentforge build", *words, "--overwrite"])


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _checkpoint(name: Any) -> str:
    """Return a checkpoint's name as a shell word, or a placeholder if it cannot be one."""
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_CHECKPOINT or name.startswith("-"):
        return "CHECKPOINT"
    return shlex.quote(printable(name))
