"""Directory layout of optimum-onnx: import of its exports, and engines that its pipelines load.

By optimum/exporters/onnx/convert.py and optimum/onnxruntime/modeling_diffusion.py of release 0.1
(https://github.com/huggingface/optimum-onnx), each component is a graph NAME/model.onnx with
NAME/config.json beside it; model_index.json, scheduler and tokenizers are as in diffusers. The
autoencoder is two components with the same configuration.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import msgspec
import numpy as np

import onnx
from latentforge.export.checkpoint import Checkpoint, sha256_of
from latentforge.export.families import ComponentPlan, ExportPlan
from latentforge.export.families.parts import TextEncoder
from latentforge.export.onnx import fix_dimensions
from latentforge.export.tokenizers import special_tokens
from latentforge.runtime.errors import CheckpointError, SettingsError
from latentforge.runtime.loggers import escaping_logger
from latentforge.runtime.manifest import Component, FileEntry, Manifest
from latentforge.runtime.tensor import DTYPES, TensorSpec
from latentforge.runtime.text import one_line

__all__ = [
    "OptimumGraph",
    "Layout",
    "check_layout",
    "folder_of",
    "graph_file",
    "is_exported",
    "available_plan",
    "read_graph",
    "source_hashes",
    "spaced",
    "with_outputs",
    "write_companions",
]

_log = escaping_logger(__name__)

Layout = Literal["plain", "optimum"]

_MODEL = "model.onnx"
_CONFIG = "config.json"
_AGAIN = "export it again with optimum-cli"
_VAE = ("vae_decoder", "vae_encoder")
_CLASSES = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
_OPTIONS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")

Shape = tuple[int | None, ...]
"""Sizes of a tensor in a graph; None is a free dimension."""


@dataclass(frozen=True, kw_only=True)
class OptimumGraph:
    """Component that optimum exported, checked against its configuration.

    Attributes:
        plan: plan of the component.
        folder: its folder.
        data: files with its weights, relative to the folder.
        sizes: sizes that the graph fixes, by the names of the plan's dimensions.
        inputs: the plan's inputs with the graph's dtypes and sizes.
        outputs: the plan's outputs, likewise; the graph may have more.
        precision: ``fp32`` or ``fp16``.
    """

    plan: ComponentPlan
    folder: Path
    data: tuple[str, ...]
    sizes: Mapping[str, int]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    precision: str

    @property
    def bytes(self) -> int:
        """Total size of its files."""
        return sum((self.folder / file).stat().st_size for file in (_MODEL, *self.data))

    def copy(self, directory: Path) -> Component:
        """Copy its files unchanged to directory/NAME, and return their manifest entry."""
        target = directory / folder_of(self.plan.name)
        for file in (_MODEL, *self.data):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / file, target / file)
        main = FileEntry.of(target / _MODEL, directory)
        return Component(
            file=main.file,
            sha256=main.sha256,
            bytes=main.bytes,
            data=tuple(FileEntry.of(target / file, directory) for file in self.data),
            backend="onnxruntime",
            precision=self.precision,
            inputs=self.inputs,
            outputs=self.outputs,
            overflows_fp16=self.plan.overflows_fp16,
        )


# Reading


def is_exported(checkpoint: Checkpoint) -> bool:
    """Return True if the checkpoint has its UNet as a graph only; weights take precedence."""
    unet = checkpoint.path / "unet"
    return (unet / _MODEL).is_file() and not any(unet.glob("*.safetensors"))


def available_plan(checkpoint: Checkpoint, plan: ExportPlan) -> ExportPlan:
    """Return the plan as far as the graphs go.

    There may be no VAE encoder, which text to image does not need, and sides are multiples of the
    UNet's factor, because optimum's graphs always double when they upsample.

    Raises:
        CheckpointError: the family's UNet is not one that optimum exports.
    """
    denoiser = _denoiser(plan)
    if denoiser.folder != folder_of(denoiser.name):
        raise CheckpointError(
            f"{checkpoint.name}: a {checkpoint.pipeline_class} is exported from weights, but this "
            "directory holds graphs: give the original checkpoint"
        )
    levels = len(checkpoint.config(denoiser.folder)["block_out_channels"])
    latent = msgspec.structs.replace(plan.latent, multiple=2 ** (levels - 1))
    plan = replace(plan, latent=latent)
    if plan.conditioning.channels or (checkpoint.path / "vae_encoder" / _MODEL).exists():
        return plan
    kept = tuple(part for part in plan.components if part.name != "vae_encoder")
    return replace(plan, components=kept)


def read_graph(checkpoint: Checkpoint, plan: ComponentPlan) -> OptimumGraph:
    """Read a component's graph without its external weights.

    Raises:
        CheckpointError: the graph is missing or damaged, contradicts the plan, or names weights
            outside its folder.
    """
    folder = checkpoint.path / folder_of(plan.name)
    path = _inside(folder, _MODEL)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # of the disk, protobuf or onnx
        raise CheckpointError(
            f"{path} is not an ONNX file ({one_line(error)}): {_AGAIN}"
        ) from error
    inputs, outputs, sizes = _signature(path, model.graph, plan)
    return OptimumGraph(
        plan=plan,
        folder=folder,
        data=_data_files(folder, model),
        sizes=sizes,
        inputs=inputs,
        outputs=outputs,
        precision="fp16" if _is_half(model.graph) else "fp32",
    )


def source_hashes(manifest: Manifest) -> dict[str, str]:
    """Return the sha256 of each component's files, joined in the order of their names."""
    return {
        name: sha256_of([e.sha256 for e in sorted(component.files, key=lambda e: e.file)])
        for name, component in manifest.components.items()
    }


def _signature(
    path: Path, graph: onnx.GraphProto, plan: ComponentPlan
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec], dict[str, int]]:
    """Return the plan's inputs and outputs with the graph's dtypes and sizes, and fixed sizes."""
    weights = {tensor.name for tensor in graph.initializer}  # old files list them as inputs too
    inputs = _tensors(path, [value for value in graph.input if value.name not in weights])
    outputs = _tensors(path, graph.output)
    if unknown := sorted(inputs.keys() - plan.inputs.keys()):
        raise CheckpointError(
            f"{path}: unexpected input {unknown[0]!r}: by the config.json files the component has "
            f"the inputs {', '.join(plan.inputs)}"
        )
    for kind, tensors, specs in ("input", inputs, plan.inputs), ("output", outputs, plan.outputs):
        if missing := [name for name in specs if name not in tensors]:
            raise CheckpointError(f"{path} has no {kind} {missing[0]!r}: {_AGAIN}")
    sizes = {
        dimension: size
        for name, spec in plan.inputs.items()
        for dimension, size in zip(spec.shape, inputs[name][1], strict=False)
        if isinstance(dimension, str) and size is not None
    }
    merged = (
        {name: _merged_spec(path, name, *tensors[name], spec) for name, spec in specs.items()}
        for tensors, specs in (
            (inputs, fix_dimensions(plan.inputs, sizes)),
            (outputs, fix_dimensions(plan.outputs, sizes)),
        )
    )
    return next(merged), next(merged), sizes


def _tensors(path: Path, values: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[str, Shape]]:
    """Return the dtypes, by numpy's names, and the shapes of tensors."""
    tensors = {}
    for value in values:
        kind = value.type.tensor_type
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        except (KeyError, ValueError):
            dtype = "unsupported"
        if dtype not in DTYPES or not kind.HasField("shape"):
            raise CheckpointError(f"{path}: {value.name} has an unsupported dtype or no shape")
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        tensors[value.name] = dtype, shape
    return tensors


def _merged_spec(
    path: Path, name: str, dtype: str, shape: Shape, planned: TensorSpec
) -> TensorSpec:
    """Return the planned spec with the graph's dtype, if the two are compatible."""
    if name == "timestep":
        planned = _timestep_spec(path, dtype, shape)
    same = len(shape) == len(planned.shape) and all(
        size in (None, expected) for size, expected in zip(shape, planned.shape, strict=True)
    )
    if not same or not np.can_cast(planned.dtype, dtype, "same_kind"):
        sizes = ", ".join("?" if size is None else str(size) for size in shape)
        raise CheckpointError(
            f"{path}: {name} is {dtype}[{sizes}], but by the config.json files {planned}: {_AGAIN}"
        )
    return TensorSpec(dtype, planned.shape)


def _timestep_spec(path: Path, dtype: str, shape: Shape) -> TensorSpec:
    """Return the timestep's spec: a float scalar in optimum's exports, integers in older ones."""
    if integer := dtype in ("int32", "int64"):
        text = "%s takes integer timesteps: as in optimum, samplers with fractional ones lose these"
        _log.warning(text, path)
    return TensorSpec(dtype if integer else "float32", (1,) if shape else ())


def _is_half(graph: onnx.GraphProto) -> bool:
    values = (*graph.input, *graph.output)
    kinds = {value.type.tensor_type.elem_type for value in values}
    kinds |= {tensor.data_type for tensor in graph.initializer}
    return onnx.TensorProto.FLOAT16 in kinds


def _data_files(folder: Path, model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the weight files that the graph, its subgraphs and functions name."""
    names = {
        {entry.key: entry.value for entry in part.external_data}.get("location", "")
        for part in _messages(model)
        if isinstance(part, onnx.TensorProto) and part.external_data
    }
    for name in names:
        pure = PurePosixPath(name)
        # onnxruntime marks addresses in memory with an asterisk.
        wild = not name.isprintable() or "*" in name or str(pure) in (_MODEL, _CONFIG)
        if not pure.name or pure.is_absolute() or ".." in pure.parts or wild:
            raise CheckpointError(
                f"{folder / _MODEL} refers to weights in {name!r}, which is not a file of its "
                "folder"
            )
        _inside(folder, name)
    return tuple(sorted({str(PurePosixPath(name)) for name in names}))


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, refusing links that lead out of the folder."""
    path = folder / name
    try:
        exists, inside = path.is_file(), path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a name that is too long, or circular links
        exists, inside = False, True
    if not inside:
        raise CheckpointError(f"{path} is a link out of {folder}: put the file itself there")
    if not exists:
        raise CheckpointError(f"no file {path}: {_AGAIN}")
    return path


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages nested in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)


# Writing


def check_layout(layout: Layout, name: str, plan: ExportPlan) -> None:
    """Refuse an unknown layout, and optimum's layout for a UNet that its pipelines do not run.

    Args:
        layout: the layout to check.
        name: of the family.
        plan: the family's plan of the checkpoint.

    Raises:
        SettingsError: no such layout, the UNet is not diffusers' own, or the VAE encoder gives no
            mean and variance.
    """
    if layout not in get_args(Layout):
        raise SettingsError(f"no layout {layout!r}; available: {', '.join(get_args(Layout))}")
    denoiser = _denoiser(plan)
    moments = {part.name: part.outputs for part in plan.components}.get("vae_encoder", {})
    channels = plan.conditioning.channels in ((), ("mask", "masked_image"))
    parts = {
        "UNet": channels and denoiser.folder == folder_of(denoiser.name),
        "VAE": all(spec.shape[1] == 2 * plan.latent.channels for spec in moments.values()),
    }
    for part, supported in parts.items():
        if layout == "optimum" and not supported:
            raise SettingsError(
                f"no optimum pipeline supports the {part} of {name}: export it without "
                "--layout optimum"
            )


def graph_file(name: str, layout: Layout) -> str:
    """Return the path of a component's graph in the engine directory."""
    return f"{folder_of(name)}/{_MODEL}" if layout == "optimum" else f"{name}.onnx"


def folder_of(component: str) -> str:
    """Return the folder in which optimum's exports keep a component."""
    return "unet" if component == "denoiser" else component


def spaced(size: int | str) -> int | str:
    """Write a dimension as optimum's IO binding parses it, with blanks around operators."""
    if isinstance(size, int):
        return size
    return size.replace("//", " / ").replace("*", " * ")


def with_outputs(plan: ExportPlan) -> ExportPlan:
    """Return the plan with the text encoder outputs of optimum's exports, in their order.

    optimum's pipelines take the first output for the context, or for the pooled output if there is
    one, and index the hidden states by the number of layers in config.json.
    """
    return replace(plan, components=tuple(_with_outputs(part) for part in plan.components))


def _with_outputs(plan: ComponentPlan) -> ComponentPlan:
    if "input_ids" not in plan.inputs:
        return plan
    names = ["last_hidden_state"]
    if layers := [name for name in plan.outputs if name.startswith("hidden_states.")]:
        used = int(layers[0].partition(".")[2])  # the input of the last layer
        names += [f"hidden_states.{index}" for index in range(used + 2)]
    if "text_embeds" in plan.outputs:
        names.insert(0, "text_embeds")
    else:
        names.insert(1, "pooler_output")
    hidden = next(spec for spec in plan.outputs.values() if len(spec.shape) == 3)
    row = TensorSpec(hidden.dtype, (hidden.shape[0], hidden.shape[2]))
    specs = {"pooler_output": row, **plan.outputs}
    outputs = {name: specs.get(name, hidden) for name in names}
    return replace(plan, outputs=outputs, wrap=partial(TextEncoder, outputs=tuple(names)))


def write_companions(
    checkpoint: Checkpoint, plan: ExportPlan, components: Sequence[str], directory: Path
) -> None:
    """Write the files that optimum's pipelines read in addition to graphs and tokenizer.json.

    Args:
        checkpoint: the checkpoint.
        plan: its export plan.
        components: names of the exported components.
        directory: the engine directory.

    Raises:
        CheckpointError: a configuration or tokenizer of the checkpoint is missing or malformed.
    """
    for name in components:
        folder = folder_of(name)
        _write_json(directory / folder / _CONFIG, _config(checkpoint, plan, folder))
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    _write_json(directory / "scheduler" / "scheduler_config.json", _portable(scheduler))
    for folder in plan.tokenizers:
        _write_tokenizer(checkpoint, folder, directory / folder)
    index = _index(checkpoint, plan, str(scheduler.get("_class_name")))
    _write_json(directory / "model_index.json", index)


def _config(checkpoint: Checkpoint, plan: ExportPlan, name: str) -> dict[str, Any]:
    """Return the checkpoint's configuration, with keys that optimum would guess or warn about."""
    config = _portable(checkpoint.config("vae" if name in _VAE else name))
    if name in _VAE:
        return {"scaling_factor": plan.latent.scaling_factor, **config}
    return {"time_cond_proj_dim": None, **config} if name == "unet" else config


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without its origin and without references to code."""
    return {key: v for key, v in config.items() if key not in ("_name_or_path", "auto_map")}


def _index(checkpoint: Checkpoint, plan: ExportPlan, scheduler: str) -> dict[str, Any]:
    """Return model_index.json. Class names come from a table, since optimum imports them."""
    parts = {folder_of(part.name) for part in plan.components} | {"vae", *plan.tokenizers}
    classes = {
        name: pair if name in parts else (None, None)
        for name, pair in _CLASSES.items()
        if name in parts or not name.endswith("_2")  # a refiner lacks the first of two
    }
    options = {key: checkpoint.index[key] for key in _OPTIONS if key in checkpoint.index}
    return {
        "_class_name": checkpoint.pipeline_class,
        "_diffusers_version": checkpoint.index.get("_diffusers_version", "0.39.0"),
        **options,
        "scheduler": ("diffusers", scheduler),
        **classes,
    }


def _write_tokenizer(checkpoint: Checkpoint, folder: str, target: Path) -> None:
    """Write a CLIPTokenizer's files for transformers 4; version 5 needs tokenizer.json only."""
    converted = json.loads((target / "tokenizer.json").read_bytes())
    special = special_tokens(checkpoint, folder)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": converted["truncation"]["max_length"],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in converted["added_tokens"]
        },
        **special,
    }
    _write_json(target / "tokenizer_config.json", config)
    _write_json(target / "special_tokens_map.json", special)
    source = [checkpoint.path / folder / name for name in ("vocab.json", "merges.txt")]
    if all(path.is_file() for path in source):
        for path in source:
            shutil.copyfile(path, target / path.name)
        return
    _write_json(target / "vocab.json", converted["model"]["vocab"])
    pairs = (" ".join(pair) for pair in converted["model"]["merges"])
    lines = ["#version: 0.2", *pairs]  # transformers 4 skips the first line
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _denoiser(plan: ExportPlan) -> ComponentPlan:
    return next(part for part in plan.components if part.name == "denoiser")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
