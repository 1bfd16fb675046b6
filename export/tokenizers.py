"""A checkpoint's CLIP tokenizer, in the one file that the runtime reads."""

import reprlib
from pathlib import Path

from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from latentforge.export.checkpoint import Checkpoint, brief
from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.manifest import MAX_TOKENS, TokenizerEntry, hash_file

__all__ = ["write_tokenizer"]


def write_tokenizer(checkpoint: Checkpoint, folder: str, directory: Path) -> TokenizerEntry:
    """Write directory/folder/tokenizer.json, padding and cutting included.

    Raises:
        CheckpointError: the tokenizer's files are missing or malformed.
    """
    config = checkpoint.config(folder, "tokenizer_config.json")
    length = config.get("model_max_length", 77)
    if type(length) is not int or not 3 <= length <= MAX_TOKENS:
        raise CheckpointError(
            f"{checkpoint.path / folder}: model_max_length is 3 to {MAX_TOKENS} tokens, not "
            f"{reprlib.repr(length)}"
        )
    try:
        clip = CLIPTokenizer.from_pretrained(checkpoint.path / folder, local_files_only=True)
        tokenizer = Tokenizer.from_str(clip.backend_tokenizer.to_str())
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(
            length=length, pad_id=int(clip.pad_token_id), pad_token=str(clip.pad_token)
        )
    except Exception as error:  # missing vocab, bad merges: each library has its own
        reason = brief(error)
        raise CheckpointError(f"cannot load {checkpoint.path / folder}: {reason}") from error
    path = directory / folder / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return TokenizerEntry(
        file=f"{folder}/tokenizer.json",
        sha256=hash_file(path),
        bytes=path.stat().st_size,
        max_length=length,
    )
