"""Conversion of a checkpoint's CLIP tokenizer to the tokenizer.json that the runtime reads."""

import json
import reprlib
from pathlib import Path

from transformers import CLIPTokenizer

from latentforge.export.checkpoint import Checkpoint, read_json
from latentforge.export.modules import quiet
from latentforge.runtime.conditioning.tokenizer_file import (
    check_token_ids,
    check_tokenizer_file,
)
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.files import hash_file
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import MAX_TOKENS, TokenizerEntry
from latentforge.runtime.text import one_line
from tokenizers import Tokenizer

__all__ = ["special_tokens", "write_tokenizer"]

_log = escaping_logger(__name__)


def write_tokenizer(checkpoint: Checkpoint, folder: str, directory: Path) -> TokenizerEntry:
    """Write directory/folder/tokenizer.json, with padding and truncation to the full length.

    Args:
        checkpoint: the checkpoint.
        folder: of the tokenizer, in the checkpoint and in the engine directory.
        directory: the engine directory.

    Raises:
        CheckpointError: the tokenizer's files are missing or malformed, it encodes at random or
            without a time limit, or the text encoder of the same number has fewer token ids or
            positions.
    """
    length = _length(checkpoint, folder)
    _check_dropout(checkpoint.path / folder)
    try:
        _check_ids(checkpoint.path / folder)
        with quiet():
            clip = CLIPTokenizer.from_pretrained(checkpoint.path / folder, local_files_only=True)
        tokenizer = Tokenizer.from_str(clip.backend_tokenizer.to_str())
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(
            length=length, pad_id=int(clip.pad_token_id), pad_token=str(clip.pad_token)
        )
        check_tokenizer_file(json.loads(tokenizer.to_str()))
    except Exception as error:  # missing vocab, bad merges: the libraries have no common class
        reason = one_line(error)
        raise CheckpointError(f"cannot load {checkpoint.path / folder}: {reason}") from error
    _check_merges(checkpoint.path / folder, tokenizer)
    _check_encoder(checkpoint, folder, tokenizer, length)
    path = directory / folder / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return TokenizerEntry(
        file=f"{folder}/tokenizer.json",
        sha256=hash_file(path),
        bytes=path.stat().st_size,
        max_length=length,
    )


def special_tokens(checkpoint: Checkpoint, folder: str) -> dict[str, str]:
    """Return the start, end, unknown and padding tokens, by their names in a tokenizer_config."""
    with quiet():
        clip = CLIPTokenizer.from_pretrained(checkpoint.path / folder, local_files_only=True)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {name: str(getattr(clip, name)) for name in names}


def _length(checkpoint: Checkpoint, folder: str) -> int:
    length = checkpoint.config(folder, "tokenizer_config.json").get("model_max_length", 77)
    if type(length) is not int or not 3 <= length <= MAX_TOKENS:
        raise CheckpointError(
            f"{checkpoint.path / folder}: model_max_length must be 3 to {MAX_TOKENS} tokens, not "
            f"{reprlib.repr(length)}"
        )
    return length


def _check_dropout(path: Path) -> None:
    """Refuse a tokenizer.json with dropout, which CLIPTokenizer would leave out without a word."""
    file = path / "tokenizer.json"
    model = read_json(file).get("model") if file.exists() else None
    if dropout := isinstance(model, dict) and model.get("dropout"):
        raise CheckpointError(
            f"{file}: a dropout of {reprlib.repr(dropout)} draws tokens at random: set it to null"
        )


def _check_ids(path: Path) -> None:
    """Refuse token ids out of range in any file of a tokenizer, before the library reads it."""
    if (file := path / "vocab.json").exists():
        check_token_ids(read_json(file))
    if (file := path / "tokenizer.json").exists():
        model = read_json(file).get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        check_token_ids(vocabulary if isinstance(vocabulary, dict) else {})


def _check_merges(path: Path, tokenizer: Tokenizer) -> None:
    """Refuse a vocabulary without merges, and warn about tokens that no merge produces.

    A tokenizer without merges splits every word into characters, unlike in training.
    """
    model = json.loads(tokenizer.to_str())["model"]
    merged = {"".join(pair) for pair in model["merges"]}
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    words = {token for token in model["vocab"] if len(token.removesuffix("</w>")) > 1} - special
    if words and not merged:
        raise CheckpointError(f"{path} has no merges: merges.txt is damaged; fetch it again")
    if lost := words - merged:
        text = "%s: no merge produces %d tokens, such as %r: merges.txt may be truncated"
        _log.warning(text, path, len(lost), min(lost))


def _check_encoder(checkpoint: Checkpoint, folder: str, tokenizer: Tokenizer, length: int) -> None:
    """Refuse a text encoder with fewer token ids or positions than the tokenizer produces."""
    encoder = folder.replace("tokenizer", "text_encoder")
    config = checkpoint.config(encoder)
    largest = max(tokenizer.get_vocab().values(), default=0)
    for key, minimum in (("vocab_size", largest + 1), ("max_position_embeddings", length)):
        size = config.get(key, minimum)
        if type(size) is not int or size < minimum:
            raise CheckpointError(
                f"{checkpoint.name}: {folder} needs a {key} of at least {minimum}, but {encoder} "
                f"has {reprlib.repr(size)}"
            )
