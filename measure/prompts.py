"""Prompts for calibration, gates and evaluation."""

from pathlib import Path

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import read_file
from latentforge.runtime.validation import checked_path

__all__ = ["read_prompts"]

_PROMPTS = Path(__file__).with_name("prompts.txt")
_MAX_BYTES = 1 << 20


def read_prompts(path: Path | None = None) -> list[str]:
    """Return the prompts of a text file, one per line; without a path, those of the package.

    Raises:
        SettingsError: the file cannot be read, or has no prompts.
    """
    path = _PROMPTS if path is None else checked_path("prompts", path)
    try:
        text = read_file(path, _MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(
            f"cannot read prompts from {path}: {reason}; give a text file with one per line"
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise SettingsError(f"{path} has no prompts: write one typical prompt per line")
    return prompts
