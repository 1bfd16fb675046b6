"""Read a diffusers checkpoint: a directory, a model hub id, or the demo checkpoint.

Only safetensors weights and JSON or text files are read. Nothing in a checkpoint is run.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.files import hash_file
from latentforge.runtime.text import one_line

__all__ = ["DEMO", "SIDECAR", "Checkpoint", "open_checkpoint", "read_json", "sha256_of"]

DEMO = "demo"
"""Name of the checkpoint in the package latentforge-demo; a directory demo/ is never meant by it."""

SIDECAR = "latentforge.json"
"""A file that a checkpoint may carry for us: {"name", "license", "defaults": {...}}."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_WEIGHTS = ("diffusion_pytorch_model", "model")
_MAX_JSON = 64 << 20
_MAX_CARD = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint directory whose files have been looked at.

    Attributes:
        name: what the user called it.
        path: the directory.
        index: the parsed model_index.json.
    """

    name: str
    path: Path
    index: dict[str, Any]

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that the checkpoint names, less what optimum puts before it."""
        return str(self.index.get("_class_name")).removeprefix("ORT")

    @property
    def sidecar(self) -> dict[str, Any]:
        """What the checkpoint says to us in latentforge.json, if it is there.

        Raises:
            CheckpointError: it is malformed.
        """
        path = self.path / SIDECAR
        found = read_json(path) if path.exists() else {}
        content = {key: value for key, value in found.items() if value is not None}
        for key, kind in (("name", str), ("license", str), ("defaults", dict)):
            if key in content and not isinstance(content[key], kind):
                raise CheckpointError(f"{path}: {key} is not of type {kind.__name__}")
        return content

    @property
    def license(self) -> str | None:
        """The licence that the sidecar or the model card's header names."""
        card = self.path / "README.md"
        if "license" in self.sidecar or not card.is_file():
            return self.sidecar.get("license")
        with card.open(encoding="utf-8", errors="replace") as file:
            header = re.match(r"---\n(.*?)\n---", file.read(_MAX_CARD), re.DOTALL)
        found = re.search(r"^license:\s*(\S+)", header[1], re.MULTILINE) if header else None
        return found[1] if found else None

    def config(self, folder: str, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration.

        What optimum exported has no vae/: the halves of one have its configuration each.

        Raises:
            CheckpointError: the component or its configuration is missing or malformed.
        """
        if folder == "vae" and not (self.path / folder).is_dir():
            folder = "vae_decoder" if (self.path / "vae_decoder").is_dir() else folder
        if not (self.path / folder).is_dir():
            raise CheckpointError(f"{self.name} has no {folder}/: the checkpoint is incomplete")
        return read_json(self.path / folder / file)

    def weights(self, folder: str) -> tuple[list[Path], str | None]:
        """The weight files of a component, and the variant they are of ("fp16") or None.

        Raises:
            CheckpointError: there are none, they are pickles, or one is damaged.
        """
        directory = self.path / folder
        for variant in (None, "fp16"):
            if files := _safetensors(directory, variant):
                for file in files:
                    _check_safetensors(file)
                return files, variant
        raise CheckpointError(_no_weights(directory))

    def parameters(self, folder: str) -> int:
        """How many numbers the weights of a component are, as their files' headers say."""
        count = 0
        for path in self.weights(folder)[0]:
            with safe_open(path, framework="numpy") as file:
                count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
        return count

    def sha256(self, folder: str) -> str:
        """The sha256 of a component's weights; of its shards' hashes where there are many."""
        return sha256_of([hash_file(file) for file in self.weights(folder)[0]])


def open_checkpoint(name: str) -> Checkpoint:
    """Find a checkpoint, downloading it when ``name`` is a hub id such as ``org/model``.

    Raises:
        CheckpointError: there is none, or it is no diffusers directory.
    """
    path = _find(name)
    if not (path / "model_index.json").is_file():
        raise CheckpointError(f"{name} is no diffusers checkpoint: it has no model_index.json")
    return Checkpoint(name=name, path=path, index=read_json(path / "model_index.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"no file {path}: the checkpoint is incomplete; fetch it again")
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON >> 20} MiB: fetch it again")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def sha256_of(digests: Sequence[str]) -> str:
    """The one of a single file, or the sha256 of many files' digests in a row."""
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def _find(name: str) -> Path:
    if name == DEMO:
        from latentforge.export.demo import CHECKPOINT

        return CHECKPOINT
    path = Path(name)
    try:
        if path.is_dir():
            return path
        if path.is_file():
            raise CheckpointError(_no_directory(path))
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise CheckpointError(f"no checkpoint {name[:60]!r}: {error}"[:200]) from error
    if _HUB_ID.fullmatch(name):
        return _download(name)
    raise CheckpointError(f"no checkpoint {name}: name a directory, a hub id org/model, or demo")


def _no_directory(path: Path) -> str:
    danger = (
        ", on a machine you can spare, since this pickle can run code when it is loaded"
        if path.suffix in _PICKLES
        else ""
    )
    return (
        f"{path} is a single file: convert it to a directory first, with diffusers' "
        f"StableDiffusionPipeline.from_single_file(...).save_pretrained(...){danger}"
    )


def _download(name: str) -> Path:
    """Fetch what we read and nothing else: pickles never reach the disk."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    fetch = partial(snapshot_download, repository, revision=revision or None)
    ignored = ["*non_ema*", "safety_checker/*", "openvino*", "onnx*", "flax*"]
    try:
        path = Path(fetch(allow_patterns=["*.json", "*.txt", "README.md"], ignore_patterns=ignored))
        if (path / "flexible_unet").is_dir():
            ignored.append("unet/*")  # gigabytes that only hold the place: see families
        return Path(fetch(allow_patterns=["*/*.safetensors"], ignore_patterns=ignored))
    except Exception as error:  # a dozen kinds, from the hub, the network and the disk
        raise CheckpointError(
            f"no directory {name}, and it could not be fetched from the hub: {one_line(error)}"
        ) from error


def _safetensors(directory: Path, variant: str | None) -> list[Path]:
    """The weight files of one variant: a single file, or the shards that its index names."""
    middle = f".{variant}" if variant else ""
    for stem in _WEIGHTS:
        single = directory / f"{stem}{middle}.safetensors"
        index = directory / f"{stem}.safetensors.index{middle}.json"
        if single.is_file() and index.is_file():
            raise CheckpointError(
                f"{directory} holds {single.name} and {index.name}, and the libraries differ in "
                "which one counts: remove one of them"
            )
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map: fetch it again")
    for name in names.values():
        inside = isinstance(name, str) and Path(name).name == name
        if not inside or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names a shard {name!r} that is not there")
    return [index.parent / name for name in sorted(set(names.values()))]


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({one_line(error)}): fetch it again"
        ) from error


def _no_weights(directory: Path) -> str:
    pickles = [f.name for f in sorted(directory.glob("*")) if f.suffix in _PICKLES]
    if not pickles:
        return f"{directory} holds no weights: expected a .safetensors file"
    return (
        f"{directory / pickles[0]} is a pickle, which can run code when it is loaded: convert it "
        "first, on a machine you can spare, by loading the model with diffusers and calling "
        "save_pretrained(..., safe_serialization=True)"
    )
