"""State of a training on the disk: complete, and never a pickle.

    state-UPDATE/
        tensors.safetensors    weights, their average, and the optimizer's moments
        state.json             everything else, and which training it belongs to

Random numbers come from generators that are seeded by the update, so there is nothing to keep of
them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentforge.runtime.disk import naming_full_disk
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.files import staged_directory

__all__ = ["TrainingState", "load_state", "save_state"]

_TENSORS, _CONTENT = "tensors.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """State after an update.

    Attributes:
        update: number of updates done.
        owner: what the training depends on: hashes of teacher and student, and the request.
        content: JSON values.
        tensors: by name.
    """

    update: int
    owner: Mapping[str, Any]
    content: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save_state(folder: Path, state: TrainingState) -> None:
    """Write a state, and delete those before it.

    Raises:
        TargetError: it cannot be written; the one before it is left.
    """
    target = folder / f"state-{state.update:09}"
    if target.exists():
        return
    content = {"update": state.update, "owner": state.owner, "content": state.content}
    with staged_directory(target) as partial, naming_full_disk(target, partial):
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
        save_file(tensors, partial / _TENSORS)
        (partial / _CONTENT).write_text(json.dumps(content), encoding="utf-8")
    for old in _states(folder):
        if old.name < target.name:
            shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, owner: Mapping[str, Any]) -> TrainingState | None:
    """Return the latest state in a folder, or None if there is none.

    Raises:
        SettingsError: it belongs to another training, or is damaged.
    """
    states = _states(folder)
    if not states:
        return None
    path = states[-1]
    try:
        read = json.loads((path / _CONTENT).read_text(encoding="utf-8"))
        found, content, update = read["owner"], read["content"], int(read["update"])
        _check_owner(path, found, json.loads(json.dumps(owner)))
        tensors = load_file(path / _TENSORS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SettingsError(
            f"{path} is damaged: delete it to go on from an earlier state, or from the start"
        ) from error
    return TrainingState(update=update, owner=owner, content=content, tensors=tensors)


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("state-*") if path.is_dir())


def _check_owner(path: Path, found: Mapping[str, Any], owner: Mapping[str, Any]) -> None:
    flat, other = ({**o, **o["request"], "request": None} for o in (owner, found))
    for name in flat:
        if flat[name] != other.get(name):
            raise SettingsError(
                f"{path} is of another training, whose {name} is {_short(other.get(name))} and not "
                f"{_short(flat[name])}: repeat that one's options, or name another --work folder"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
