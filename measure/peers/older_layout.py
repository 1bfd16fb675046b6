"""A checkpoint as programs of transformers 4's age read it, and without its pickles.

transformers 5 saves a CLIP text encoder's weights without the prefix ``text_model.`` that all
published checkpoints have. Who doesn't know of that finds no weights, and goes on with random ones.
"""

import json
import shutil
from pathlib import Path

__all__ = ["link"]

_PREFIX = "text_model."
_TEXTS = ("text_encoder", "text_encoder_2")
_WEIGHTS = "model.safetensors"
_PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def link(checkpoint: Path, target: Path) -> None:
    """Make a checkpoint out of links to another's files, but for weights that need their prefix."""
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.suffix not in _PICKLES:
            own = target / path.relative_to(checkpoint)
            own.parent.mkdir(parents=True, exist_ok=True)
            own.symlink_to(path.resolve())
    for text in _TEXTS:
        path = target / text / _WEIGHTS
        if path.is_file() and not any(name.startswith(_PREFIX) for name in _header(path)):
            _rename(path)


def _header(path: Path) -> dict[str, object]:
    """The table in front of a safetensors file: its length in 8 bytes, and JSON."""
    with path.open("rb") as file:
        content = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert isinstance(content, dict)
    return content


def _rename(path: Path) -> None:
    """Put a file with the prefix in place of a link to one without; its numbers stay the same."""
    source = path.resolve()
    kept = ("__metadata__", "text_projection.weight")
    names = {n if n in kept else _PREFIX + n: entry for n, entry in _header(source).items()}
    table = json.dumps(names).encode()
    table += b" " * (-len(table) % 8)  # the numbers begin at a multiple of 8
    path.unlink()
    with source.open("rb") as old, path.open("wb") as new:
        new.write(len(table).to_bytes(8, "little") + table)
        old.seek(8 + int.from_bytes(old.read(8), "little"))
        shutil.copyfileobj(old, new, 16 << 20)
