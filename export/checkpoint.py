"""Access to a diffusers checkpoint: a directory, a model hub id, or the demo checkpoint.

Only safetensors weights and JSON or text files are read. No code of a checkpoint is run.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from latentforge.runtime.errors import CheckpointError
from latentforge.runtime.files import hash_file
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.text import one_line

__all__ = [
    "DEMO",
    "SIDECAR",
    "Checkpoint",
    "open_checkpoint",
    "read_json",
    "sha256_of",
    "warn_once",
]

_log = escaping_logger(__name__)

DEMO = "demo"
"""Name of the checkpoint in the package latentforge-demo; it never means a directory demo/."""

SIDECAR = "latentforge.json"
"""Optional file of a checkpoint for latentforge: {"name", "license", "defaults": {...}}."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_WEIGHTS = ("diffusion_pytorch_model", "model")
_PREFERRED = ("ema", "fp32", "fp16", "bf16")
"""Variants in the order in which they are taken; then come others by name, and non_ema last."""

_STEM = "|".join(_WEIGHTS)
_WEIGHT_FILES = (
    re.compile(rf"(?P<stem>{_STEM})(\.(?P<variant>[\w-]+))?\.safetensors"),
    re.compile(rf"(?P<stem>{_STEM})\.safetensors\.index(\.(?P<variant>[\w-]+))?\.json"),
    re.compile(rf"(?P<stem>{_STEM})\.safetensors\.(?P<variant>[\w-]+)\.index\.json"),
)
"""Names of a single file, of an index of shards, and of an index by diffusers before 0.31."""

_SHARD = re.compile(r"\d{5}-of-\d{5}")
_MAX_JSON = 64 << 20
_MAX_CARD = 64 << 10
_MAX_WEIGHTS = 20_000  # of a file; those of Stable Diffusion XL have 1,700


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoint directory in the layout of diffusers.

    Attributes:
        name: name by which the user opened it.
        path: the directory.
        index: the parsed model_index.json.
    """

    name: str
    path: Path
    index: dict[str, Any]

    @property
    def pipeline_class(self) -> str:
        """Name of the checkpoint's diffusers pipeline, without the prefix that optimum adds."""
        return str(self.index.get("_class_name")).removeprefix("ORT")

    @property
    def sidecar(self) -> dict[str, Any]:
        """Content of the checkpoint's latentforge.json; empty if there is none.

        Raises:
            CheckpointError: it is malformed.
        """
        path = self.path / SIDECAR
        entries = read_json(path) if path.exists() else {}
        content = {key: value for key, value in entries.items() if value is not None}
        for key, kind in (("name", str), ("license", str), ("defaults", dict)):
            if key in content and not isinstance(content[key], kind):
                raise CheckpointError(f"{path}: {key} must be of type {kind.__name__}")
        return content

    @property
    def license(self) -> str | None:
        """Licence by the sidecar or by the header of the model card."""
        card = self.path / "README.md"
        if "license" in self.sidecar or not card.is_file():
            return self.sidecar.get("license")
        with card.open(encoding="utf-8", errors="replace") as file:
            header = re.match(r"---\n(.*?)\n---", file.read(_MAX_CARD), re.DOTALL)
        line = re.search(r"^license:\s*(\S+)", header[1], re.MULTILINE) if header else None
        return line[1] if line else None

    def config(self, folder: str, file: str = "config.json") -> dict[str, Any]:
        """Read the configuration of a component.

        Directories that optimum exported have no vae/; vae_decoder/ and vae_encoder/ each hold the
        configuration of the VAE.

        Raises:
            CheckpointError: the component or its configuration is missing or malformed.
        """
        if folder == "vae" and not (self.path / folder).is_dir():
            folder = "vae_decoder" if (self.path / "vae_decoder").is_dir() else folder
        if not (self.path / folder).is_dir():
            raise CheckpointError(f"{self.name} has no {folder}/: the checkpoint is incomplete")
        return read_json(self.path / folder / file)

    def class_name(self, folder: str) -> str | None:
        """Return the class of a component by model_index.json or else by its config.json.

        None if neither names one. Classes by which optimum runs graphs say nothing about the model.
        """
        entry = self.index.get(folder)
        named = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if named is None or str(named).startswith(("ORT", "OnnxRuntime")):
            config = self.config(folder)
            architectures = config.get("architectures")
            first = architectures[0] if isinstance(architectures, list) and architectures else None
            named = config.get("_class_name", first)
        return None if named is None else str(named)

    def weights(self, folder: str) -> tuple[list[Path], str | None]:
        """Return the weight files of a component, and their variant (such as ``fp16``, or None).

        Plain weights are taken before any variant, as in diffusers.

        Raises:
            CheckpointError: there are none, they are pickles, or one is damaged.
        """
        directory = self.path / folder
        found = _weight_files(directory)
        if not found:
            raise CheckpointError(_no_weights_message(directory))
        variant = min(found, key=_preference)
        if variant is not None:
            names = ", ".join(sorted(map(str, found)))
            warn_once(f"{directory} holds variants of its weights only ({names}): using {variant}")
        files = _safetensors(found[variant])
        for file in files:
            _check_safetensors(file)
        return files, variant

    def shapes(self, folder: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a component's weights by name, from the headers of its files."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.weights(folder)[0]:
            with safe_open(path, framework="numpy") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        return shapes

    def parameters(self, folder: str) -> int:
        """Count the parameters of a component, from the headers of its weight files."""
        return sum(map(math.prod, self.shapes(folder).values()))

    def sha256(self, folder: str) -> str:
        """Return the sha256 of a component's weights, combined by sha256_of() for shards."""
        return sha256_of([hash_file(file) for file in self.weights(folder)[0]])


def open_checkpoint(name: str) -> Checkpoint:
    """Open a checkpoint; one from the hub is downloaded first.

    Args:
        name: ``demo``, a directory, or a hub id such as ``org/model`` or ``org/model@revision``.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not a diffusers directory.
    """
    path = _find(name)
    if not (path / "model_index.json").is_file():
        raise CheckpointError(f"{name} is not a diffusers checkpoint: it has no model_index.json")
    return Checkpoint(name=name, path=path, index=read_json(path / "model_index.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is missing, too large, or does not hold a JSON object, or one
            with NaN or with half of a surrogate pair, which no text can hold.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"no file {path}: the checkpoint is incomplete; fetch it again")
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON >> 20} MiB: fetch it again")
        content = json.loads(path.read_bytes(), parse_constant=_infinity)
        json.dumps(content, ensure_ascii=False).encode()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def _infinity(constant: str) -> float:
    """Return infinity, which schedulers of diffusers have as a default; refuse NaN."""
    if constant == "NaN":
        raise ValueError("NaN is not a number")
    return float(constant)


@cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged it before: components are loaded repeatedly."""
    _log.warning("%s", message)


def sha256_of(digests: Sequence[str]) -> str:
    """Return the digest of a single file, or the sha256 of several digests joined."""
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
            raise CheckpointError(_single_file_message(path))
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise CheckpointError(f"no checkpoint {name[:60]!r}: {error}"[:200]) from error
    if _HUB_ID.fullmatch(name):
        return _download(name)
    raise CheckpointError(f"no checkpoint {name}: give a directory, a hub id org/model, or demo")


def _single_file_message(path: Path) -> str:
    danger = (
        ", in a sandbox, since a pickle can run code when it is loaded"
        if path.suffix in _PICKLES
        else ""
    )
    return (
        f"{path} is a single file: convert it to a directory first, with diffusers' "
        f"StableDiffusionPipeline.from_single_file(...).save_pretrained(...){danger}"
    )


def _download(name: str) -> Path:
    """Download the files that export reads and nothing else: no pickle reaches the disk."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    fetch = partial(snapshot_download, repository, revision=revision or None)
    unused = ["safety_checker/*", "depth_estimator/*"]
    ignored = ["*non_ema*", *unused, "openvino*", "onnx*", "flax*"]
    try:
        path = Path(fetch(allow_patterns=["*.json", "*.txt", "README.md"], ignore_patterns=ignored))
        if (path / "flexible_unet").is_dir():
            ignored.append("unet/*")  # a placeholder of gigabytes: see families
        return Path(fetch(allow_patterns=["*/*.safetensors"], ignore_patterns=ignored))
    except Exception as error:  # many classes, from the hub, the network and the disk
        raise CheckpointError(
            f"{name} is not a directory, and downloading it from the hub failed: {one_line(error)}"
        ) from error


def _weight_files(directory: Path) -> dict[str | None, list[Path]]:
    """Return single weight files and indices of shards by their variant."""
    found: dict[str, dict[str | None, list[Path]]] = {stem: {} for stem in _WEIGHTS}
    for path in sorted(directory.glob("*")):
        match = next(filter(None, (p.fullmatch(path.name) for p in _WEIGHT_FILES)), None)
        if match is None or not path.is_file() or _SHARD.search(path.name):
            continue
        variant = match.groupdict().get("variant")
        found[match["stem"]].setdefault(variant, []).append(path)
    return next(filter(None, found.values()), {})


def _preference(variant: str | None) -> tuple[int, str]:
    if variant is None or variant == "non_ema":
        return (-1 if variant is None else len(_PREFERRED) + 1), ""
    known = variant in _PREFERRED
    return (_PREFERRED.index(variant) if known else len(_PREFERRED)), variant


def _safetensors(candidates: Sequence[Path]) -> list[Path]:
    """Return the weight files of one variant: a single file, or the shards of its index."""
    first, *others = candidates
    if others:
        raise CheckpointError(
            f"{first.parent} holds both {first.name} and {others[0].name}, and libraries differ in "
            "which one they load: remove one of them"
        )
    return [first] if first.suffix == ".safetensors" else _shards(first)


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map: fetch it again")
    for name in names.values():
        inside = isinstance(name, str) and Path(name).name == name
        if not inside or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names a shard {reprlib.repr(name)} that is not there")
    return [index.parent / name for name in sorted(set(names.values()))]


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy") as file:
            count = len(file.keys())
    except (SafetensorError, OSError, MemoryError) as error:  # memory: of a huge sparse file
        raise CheckpointError(
            f"{path} is damaged or truncated ({one_line(error)}): fetch it again"
        ) from error
    if count > _MAX_WEIGHTS:
        raise CheckpointError(
            f"{path} has {count} weights, and {_MAX_WEIGHTS} are allowed: fetch it again"
        )


def _no_weights_message(directory: Path) -> str:
    pickles = [f.name for f in sorted(directory.glob("*")) if f.suffix in _PICKLES]
    others = [f.name for f in sorted(directory.glob("*.safetensors"))]
    if others:
        shards = " and has no index of its shards" if _SHARD.search(others[0]) else ""
        return (
            f"{directory} holds {others[0]}{shards}, but no weights under a name that is known: "
            f"expected {' or '.join(_WEIGHTS)}[.VARIANT].safetensors"
        )
    if not pickles:
        return f"{directory} holds no weights: expected a .safetensors file"
    return (
        f"{directory / pickles[0]} is a pickle, which can run code when it is loaded: convert it "
        "first, in a sandbox, by loading the model with diffusers and calling "
        "save_pretrained(..., safe_serialization=True)"
    )
