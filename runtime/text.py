"""Short texts for people: one-line errors, sizes, and guesses at mistyped names."""

import difflib
from collections.abc import Iterable

__all__ = ["near_miss", "one_line", "size_text"]

_MAX_CHARACTERS = 300


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line of at most 300 characters, or its type's name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 3]}..."


def near_miss(word: str, choices: Iterable[str]) -> str:
    """Return the choice nearest to a mistyped word, if one is near, and the list of all."""
    words = list(choices)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}there are {', '.join(words)}"


def size_text(count: float) -> str:
    """Return a number of bytes in MB, or in GB from 1 GB on."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
