"""Prompts to token ids, on the tokenizers library."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from latentforge.runtime.errors import ManifestError
from latentforge.runtime.manifest import TokenizerEntry

__all__ = ["Tokenizer"]

_log = logging.getLogger(__name__)


class Tokenizer:
    """A CLIP tokenizer: every prompt becomes ``max_length`` ids, start and end included.

    The file holds the whole recipe (normalizing, byte-pair merges, special tokens), so the
    ids are those of transformers' CLIPTokenizer.
    """

    def __init__(self, path: Path, entry: TokenizerEntry) -> None:
        self.max_length = entry.max_length
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ManifestError(f"{path} is not a tokenizer file: {error}") from error
        self._tokenizer.enable_truncation(self.max_length)

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Encode prompts into ids of shape (len(prompts), max_length).

        A prompt that is too long is cut, and a warning names what was lost.
        """
        encodings = self._tokenizer.encode_batch(list(prompts))
        for encoding in encodings:
            if encoding.overflowing:
                lost = [token for part in encoding.overflowing for token in part.tokens[1:-1]]
                tail = "".join(lost).replace("</w>", " ").strip()
                shown = tail if len(tail) <= 60 else f"{tail[:57]}..."
                _log.warning("prompt cut at %d tokens; not seen: %s", self.max_length, shown)
        return np.array([encoding.ids for encoding in encodings], np.int64)
