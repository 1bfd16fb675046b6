"""Conversion of prompts to token ids, by the tokenizers library."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.manifest import TokenizerEntry
from latentforge.runtime.text import one_line

__all__ = ["Tokenizer"]

_log = logging.getLogger(__name__)

_SHOWN = 60
"""Characters of the truncated part that the warning shows."""


class Tokenizer:
    """CLIP tokenizer: every prompt becomes ``max_length`` ids, including start and end tokens.

    The file defines everything (normalization, byte-pair merges, special tokens), so the ids equal
    those of transformers' CLIPTokenizer.
    """

    def __init__(self, path: Path, entry: TokenizerEntry) -> None:
        """Load a tokenizer file.

        Args:
            path: the file.
            entry: its manifest entry.

        Raises:
            ManifestError: the file is damaged, or does not pad and truncate to max_length.
        """
        self.max_length = entry.max_length
        try:
            self._tokenizer = _load(path, self.max_length)
        except BaseException as error:  # plain Exception, or a Rust panic, which is not even that
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            reason = one_line(error)
            raise ManifestError(
                f"{path} is not a valid tokenizer file: {reason}; export again"
            ) from error

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Encode prompts into ids of shape (len(prompts), max_length).

        A prompt that is too long is truncated, and a warning shows the part that was cut off.
        """
        encodings = self._tokenizer.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:
                tail = prompt[_first_character(encoding.overflowing[0]) :].strip()
                shown = tail if len(tail) <= _SHOWN else f"{tail[: _SHOWN - 3]}..."
                _log.warning("prompt truncated to %d tokens; ignored: %r", self.max_length, shown)
        return np.array([encoding.ids for encoding in encodings], np.int64)


def _first_character(encoding: tokenizers.Encoding) -> int:
    """Return the position in the prompt of the first token that is not a special one."""
    marks = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return next((start for (start, _), special in marks if not special), 0)


def _load(path: Path, length: int) -> tokenizers.Tokenizer:
    """Load a tokenizer, and check it on a prompt that is too short and one that is too long."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(length)
    padding = tokenizer.padding
    if padding is None or padding["length"] != length:
        raise ValueError(f"its padding is not to {length} tokens")
    for encoding in tokenizer.encode_batch(["", "a " * length]):
        if len(encoding.ids) != length:
            raise ValueError(f"it returns {len(encoding.ids)} tokens, not {length}")
    return tokenizer
