"""Conversion of prompts to token ids, by the tokenizers library."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import tokenizers
from numpy.typing import NDArray

from latentforge.runtime.conditioning.tokenizer_file import check_tokenizer_file
from latentforge.runtime.errors import ManifestError, SettingsError
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import TokenizerEntry
from latentforge.runtime.text import one_line

__all__ = ["Tokenizer"]

_log = escaping_logger(__name__)

_MAX_BYTES = 24 << 20  # parsed, it takes thirty times as much memory

_MAX_EXPANDED = 65_536
"""Most characters of a prompt with all vectors of its textual inversions."""

_SHOWN = 60
"""Characters of the truncated part that warnings show."""


class Tokenizer:
    """CLIP tokenizer: every prompt becomes ``max_length`` ids, including start and end tokens.

    The file defines everything (normalization, byte-pair merges, special tokens), so the ids equal
    those of transformers' CLIPTokenizer. A token that was added for a textual inversion of several
    vectors, ``T`` beside ``T_1``, ``T_2``, ..., becomes all of them, as in diffusers' pipelines.
    """

    def __init__(self, path: Path, entry: TokenizerEntry) -> None:
        """Load a tokenizer file.

        Args:
            path: the file.
            entry: its manifest entry.

        Raises:
            ManifestError: the file is damaged, does not pad and truncate to max_length, encodes
                at random, or has no tokens or no time limit for some text.
        """
        self.max_length = entry.max_length
        self._path = path
        with _blaming(path):
            self._tokenizer = _load(_read(path), self.max_length)
            self._added = _Placeholders(self._tokenizer)

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Encode prompts into ids of shape (len(prompts), max_length).

        A prompt that is too long is truncated, and a warning shows the part that was cut off.

        Raises:
            SettingsError: a prompt becomes too long with all vectors of its textual inversions.
            ManifestError: the library fails on a prompt, which a damaged file lets it do.
        """
        with _blaming(self._path):
            texts = [self._added.expand(prompt) for prompt in prompts]
            encodings = self._tokenizer.encode_batch(texts)
        for prompt, encoding in zip(texts, encodings, strict=True):
            if tail := _shown_tail(prompt, encoding):
                _log.warning("prompt truncated to %d tokens; ignored: %r", self.max_length, tail)
        return np.array([encoding.ids for encoding in encodings], np.int64)

    def ignored(self, prompt: str) -> str:
        """Return the start of the part of a prompt that is cut off; empty if it all fits.

        Raises:
            SettingsError, ManifestError: as for encoding it.
        """
        with _blaming(self._path):
            text = self._added.expand(prompt)
            return _shown_tail(text, self._tokenizer.encode(text))


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn errors of the tokenizers library into ManifestErrors about a file."""
    try:
        yield
    except BaseException as error:  # plain Exception, or a Rust panic, which is not even that
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | SettingsError):
            raise
        reason = one_line(error)
        raise ManifestError(
            f"{path} is not a valid tokenizer file: {reason}; export again"
        ) from error


def _shown_tail(prompt: str, encoding: tokenizers.Encoding) -> str:
    """Return the start of what a prompt has beyond its tokens; empty if there is nothing."""
    if not encoding.overflowing:
        return ""
    tail = prompt[_first_character(encoding.overflowing[0]) :].strip()
    return tail if len(tail) <= _SHOWN else f"{tail[: _SHOWN - 3]}..."


def _first_character(encoding: tokenizers.Encoding) -> int:
    """Return the position in the prompt of the first token that is not a special one."""
    marks = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return next((start for (start, _), special in marks if not special), 0)


class _Placeholders:
    """Added tokens that stand for several: diffusers' TextualInversionLoaderMixin.

    Attributes:
        replacements: ``T T_1 T_2`` and so on, by ``T``.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.replacements = _replacements(
            {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        )
        if self.replacements:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    def expand(self, prompt: str) -> str:
        """Return a prompt with all vectors of each textual inversion, in the order of the prompt.

        Raises:
            SettingsError: it becomes too long.
        """
        if not any(token in prompt for token in self.replacements):
            return prompt
        tokens = self._tokenizer.encode(prompt, add_special_tokens=False).tokens
        for token in dict.fromkeys(tokens):
            prompt = prompt.replace(token, self.replacements.get(token, token))
            if len(prompt) > _MAX_EXPANDED:
                raise SettingsError(
                    f"a prompt has over {_MAX_EXPANDED:,} characters with all vectors of "
                    f"{token[:_SHOWN]!r}: write the token once"
                )
        return prompt


def _replacements(added: set[str]) -> Mapping[str, str]:
    """Return the placeholders among added tokens, each with its replacement."""
    found = {}
    for token in added:
        names, count = [token], 1
        while (name := f"{token}_{count}") in added:
            names.append(name)
            count += 1
        if count > 1:
            found[token] = " ".join(names)
    return found


def _read(path: Path) -> bytes:
    """Return a tokenizer file as it was checked, without keys that occur twice."""
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"it has {size >> 20} MiB, and {_MAX_BYTES >> 20} are allowed")
    content = msgspec.json.decode(path.read_bytes())
    check_tokenizer_file(content)
    return msgspec.json.encode(content)


def _load(content: bytes, length: int) -> tokenizers.Tokenizer:
    """Load a tokenizer, and check it on a prompt that is too short and one that is too long."""
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.enable_truncation(length)
    padding = tokenizer.padding
    if padding is None or padding["length"] != length:
        raise ValueError(f"its padding is not to {length} tokens")
    for encoding in tokenizer.encode_batch(["", "a " * length]):
        if len(encoding.ids) != length:
            raise ValueError(f"it returns {len(encoding.ids)} tokens, not {length}")
    return tokenizer
