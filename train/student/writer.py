"""Student checkpoints in diffusers' layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latentforge.export.checkpoint import Checkpoint
from latentforge.export.models.searched_unet import SearchedUNet2DConditionModel
from latentforge.runtime.files import DirectoryKind, link_files, staged_directory

__all__ = [
    "DISTILL_RECORD",
    "PAGE",
    "RECORD",
    "STUDENT",
    "TRAINED",
    "unchanged_files",
    "write_json",
    "write_student",
    "write_weights",
]

RECORD = "search.json"
"""File of a student's checkpoint that says where it comes from."""

PAGE = "search.html"
"""Page that is drawn from it."""

DISTILL_RECORD = "distill.json"
"""File of a trained student that says how it was trained."""

STUDENT = DirectoryKind(RECORD, "an untrained student of latentforge search", DISTILL_RECORD)
TRAINED = DirectoryKind(DISTILL_RECORD, "a student of latentforge distill")

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_COPIED = (".json", ".safetensors", ".txt")
_COPIED_OF_ALL = ("latentforge.json", "LICENSE*", "README.md")


def write_student(
    teacher: Checkpoint,
    student: SearchedUNet2DConditionModel,
    target: Path,
    record: Mapping[str, Any],
    page: str = "",
    *,
    overwrite: bool = False,
) -> None:
    """Write a student's checkpoint: the teacher's, with the student in unet/.

    Weights have the precision that they have in the teacher. Files that do not differ are hard
    links where the file system has them. model_index.json names a class of latentforge, so that
    diffusers refuses the checkpoint by this name.

    Args:
        teacher: checkpoint of the teacher.
        student: the student, by student_module().
        target: directory to write, completely or not at all.
        record: content of search.json.
        page: content of search.html, if there is one.
        overwrite: replace an untrained student that is there.

    Raises:
        TargetError: the directory cannot be written; it exists, or is no untrained student.
    """
    name = type(student).__name__
    structure = {"structure": student.config.structure}
    config = {**teacher.config("unet"), "_class_name": name, **structure}
    with staged_directory(target, overwrite=overwrite, kind=STUDENT) as partial:
        link_files(unchanged_files(teacher), teacher.path, partial)
        write_json(partial / "model_index.json", {**teacher.index, "unet": ["latentforge", name]})
        write_json(partial / "unet" / "config.json", config)
        write_json(partial / RECORD, record)
        if page:
            (partial / PAGE).write_text(page, encoding="utf-8")
        write_weights(student, teacher, partial / "unet")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of a checkpoint, and the folder that it is in if there is none yet."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unchanged_files(teacher: Checkpoint) -> list[str]:
    """Return the files to copy, relative to the checkpoint; none of them is a pickle."""
    components = [name for name, entry in teacher.index.items() if isinstance(entry, list)]
    inside = [name for name in sorted(components) if Path(name).name == name and name != ".."]
    folders = [teacher.path / name for name in inside if name != "unet"]
    files = [path for pattern in _COPIED_OF_ALL for path in sorted(teacher.path.glob(pattern))]
    files += [path for folder in folders for path in sorted(folder.glob("*"))]
    return [
        path.relative_to(teacher.path).as_posix()
        for path in files
        if path.is_file() and (path.suffix in _COPIED or path.parent == teacher.path)
    ]


def write_weights(unet: nn.Module, origin: Checkpoint, folder: Path) -> None:
    """Write the weights of a UNet in the precision that they have in the checkpoint it is from."""
    path = folder / _WEIGHTS
    path.touch()
    mode = path.stat().st_mode
    save_file(_stored_weights(origin, unet.state_dict()), path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors lets the owner alone read it


def _stored_weights(teacher: Checkpoint, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in the precision of the teacher's weights of the same name."""
    files, _ = teacher.weights("unet")
    kinds: dict[str, torch.dtype | None] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            kinds |= {name: _KINDS.get(file.get_slice(name).get_dtype()) for name in file.keys()}
    return {
        name: weight.to(kinds.get(name) or weight.dtype).contiguous()
        for name, weight in weights.items()
    }
