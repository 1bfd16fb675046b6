"""Texts for messages: errors on one line, sizes, durations, and suggestions for mistyped names."""

import difflib
from collections.abc import Iterable

__all__ = ["duration_text", "near_miss", "one_line", "printable", "size_text"]


_MAX_COMPARED = 200  # characters: comparing more takes long, and no name has them


def one_line(error: object, *, limit: int | None = 300) -> str:
    """Return the message of an error on one line, or its type's name if it has none.

    Args:
        error: the error, or its message.
        limit: characters to cut the line to; None keeps it whole.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if limit is None or len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    """Return text with every character escaped that a terminal would not print."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def near_miss(word: str, choices: Iterable[str]) -> str:
    """Return a suggestion for a mistyped word, if a choice is close to it, and the list of all."""
    words = list(choices)
    close = difflib.get_close_matches(word[:_MAX_COMPARED], words, n=1, cutoff=0.5)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}choose from {', '.join(words)}"


def size_text(count: float) -> str:
    """Return a number of bytes in MB, or in GB from 1 GB on."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def duration_text(seconds: float) -> str:
    """Return a duration as 45s, 12m or 2h05m: whole minutes from 90 seconds on."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m"
