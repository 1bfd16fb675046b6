"""Prompts to token ids, on the tokenizers library."""

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
"""Characters of a cut prompt that the warning shows."""


class Tokenizer:
    """A CLIP tokenizer: every prompt becomes ``max_length`` ids, start and end included.

    The file holds the whole recipe (normalizing, byte-pair merges, special tokens), so the
    ids are those of transformers' CLIPTokenizer.
    """

    def __init__(self, path: Path, entry: TokenizerEntry) -> None:
        self.max_length = entry.max_length
        try:
            self._tokenizer = _load(path, self.max_length)
        except BaseException as error:  # plain Exception, or a Rust panic, which is not even that
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            reason = one_line(error)
            raise ManifestError(f"{path} is no tokenizer file: {reason}; export again") from error

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Encode prompts into ids of shape (len(prompts), max_length).

        A prompt that is too long is cut, and a warning names what was lost.
        """
        encodings = self._tokenizer.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:
                tail = prompt[_begin(encoding.overflowing[0]) :].strip()
                shown = tail if len(tail) <= _SHOWN else f"{tail[: _SHOWN - 3]}..."
                _log.warning("prompt cut at %d tokens; not seen: %r", self.max_length, shown)
        return np.array([encoding.ids for encoding in encodings], np.int64)


def _begin(encoding: tokenizers.Encoding) -> int:
    """Where in the prompt the first token lies that is not one of the added ones."""
    marks = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return next((start for (start, _), special in marks if not special), 0)


def _load(path: Path, length: int) -> tokenizers.Tokenizer:
    """Load a tokenizer, and try it on prompts that are too short and too long."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(length)
    padding = tokenizer.padding
    if padding is None or padding["length"] != length:
        raise ValueError(f"it does not pad to {length} tokens")
    for encoding in tokenizer.encode_batch(["", "a " * length]):
        if len(encoding.ids) != length:
            raise ValueError(f"it gives {len(encoding.ids)} tokens, not {length}")
    return tokenizer
