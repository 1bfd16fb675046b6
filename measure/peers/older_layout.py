"""Checkpoints in the layout that programs from the time of transformers 4 read, without pickles.

transformers 5 saves the weights of a CLIP text encoder without the prefix ``text_model.`` that all
published checkpoints have. Programs that are not aware of this find no weights and silently
continue with random ones.
"""

import json
import shutil
from pathlib import Path

__all__ = ["link"]

_PREFIX = "text_model."
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_WEIGHTS = "model.safetensors"
_PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def link(checkpoint: Path, target: Path) -> None:
    """Create a checkpoint of links to another's files; weights that lack the prefix are copied."""
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.suffix not in _PICKLES:
            linked = target / path.relative_to(checkpoint)
            linked.parent.mkdir(parents=True, exist_ok=True)
            linked.symlink_to(path.resolve())
    for folder in _TEXT_ENCODERS:
        path = target / folder / _WEIGHTS
        if path.is_file() and not any(name.startswith(_PREFIX) for name in _header(path)):
            _add_prefix(path)


def _header(path: Path) -> dict[str, object]:
    """Return the header of a safetensors file: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        content = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert isinstance(content, dict)
    return content


def _add_prefix(path: Path) -> None:
    """Replace a link to a file without the prefix by a file with it; the data stays the same."""
    source = path.resolve()
    unprefixed = ("__metadata__", "text_projection.weight")
    names = {n if n in unprefixed else _PREFIX + n: entry for n, entry in _header(source).items()}
    header = json.dumps(names).encode()
    header += b" " * (-len(header) % 8)  # the data is aligned to 8 bytes
    path.unlink()
    with source.open("rb") as old, path.open("wb") as new:
        new.write(len(header).to_bytes(8, "little") + header)
        old.seek(8 + int.from_bytes(old.read(8), "little"))
        shutil.copyfileobj(old, new, 16 << 20)
