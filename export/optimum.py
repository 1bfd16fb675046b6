"""optimum-onnx's arrangement of a model, both ways: its exports as engines, and engines for it.

What it writes and what its pipelines read (release 0.1, optimum/exporters/onnx/convert.py and
optimum/onnxruntime/modeling_diffusion.py of https://github.com/huggingface/optimum-onnx): a graph
NAME/model.onnx with NAME/config.json beside it for each component, and model_index.json, scheduler
and tokenizers as diffusers has them. The autoencoder is two components, of one configuration.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np

import onnx
from latentforge.export.checkpoint import Checkpoint, sha256_of
from latentforge.export.families import ComponentPlan, ExportPlan
from latentforge.export.families.parts import TextEncoder
from latentforge.export.onnx import fix_dimensions
from latentforge.export.tokenizers import special_tokens
from latentforge.runtime.errors import CheckpointError, SettingsError
from latentforge.runtime.manifest import Component, FileEntry, Manifest
from latentforge.runtime.tensor import DTYPES, TensorSpec
from latentforge.runtime.text import one_line

__all__ = [
    "OptimumGraph",
    "Layout",
    "check_layout",
    "graph_file",
    "is_exported",
    "present",
    "read_graph",
    "source_hashes",
    "spaced",
    "with_outputs",
    "write_companions",
]

_log = logging.getLogger(__name__)

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
"""What a graph says of a tensor's sizes, None where it leaves one free."""


@dataclass(frozen=True, kw_only=True)
class OptimumGraph:
    """A component that optimum exported, checked against what its configuration says of it.

    Attributes:
        plan: the component that it is.
        folder: where it lies.
        data: the files that hold its weights, relative to the folder.
        sizes: those that the graph fixes, by the names of the plan's dimensions.
        inputs: the plan's, as the graph has them.
        outputs: the plan's; the graph may have more.
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
        """The size of all its files."""
        return sum((self.folder / file).stat().st_size for file in (_MODEL, *self.data))

    def copy(self, directory: Path) -> Component:
        """Copy its files, as they are, to directory/NAME, and describe them for the manifest."""
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


# Reading theirs


def is_exported(checkpoint: Checkpoint) -> bool:
    """Whether its UNet is a graph and not weights; where it is both, weights are better."""
    unet = checkpoint.path / "unet"
    return (unet / _MODEL).is_file() and not any(unet.glob("*.safetensors"))


def present(checkpoint: Checkpoint, plan: ExportPlan) -> ExportPlan:
    """The plan without the VAE's encoder where there is none: text to image does without it.

    Raises:
        CheckpointError: the UNet is one that optimum cannot have exported.
    """
    unet = _unet(plan)
    if unet.folder != folder_of(unet.name):
        raise CheckpointError(
            f"{checkpoint.name}: a {checkpoint.pipeline_class} is made from its weights, and "
            "these are graphs: name the original checkpoint"
        )
    paints = unet.inputs["sample"].shape[1] != plan.latent.channels
    if paints or (checkpoint.path / "vae_encoder" / _MODEL).exists():
        return plan
    kept = tuple(part for part in plan.components if part.name != "vae_encoder")
    return replace(plan, components=kept)


def read_graph(checkpoint: Checkpoint, plan: ComponentPlan) -> OptimumGraph:
    """Look at a component's graph without loading its weights from the files beside it.

    Raises:
        CheckpointError: it is missing or damaged, does not fit the plan, or names weights that
            are not in its folder.
    """
    folder = checkpoint.path / folder_of(plan.name)
    path = _inside(folder, _MODEL)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the disk's, protobuf's or onnx's own
        raise CheckpointError(f"{path} is no ONNX file ({one_line(error)}): {_AGAIN}") from error
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
    """The sha256 of each component's files, of many that of their hashes by name."""
    return {
        name: sha256_of([e.sha256 for e in sorted(component.files, key=lambda e: e.file)])
        for name, component in manifest.components.items()
    }


def _signature(
    path: Path, graph: onnx.GraphProto, plan: ComponentPlan
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec], dict[str, int]]:
    """Inputs and outputs by the plan, with the graph's dtypes and fixed sizes."""
    weights = {tensor.name for tensor in graph.initializer}  # old files list them as inputs too
    inputs = _tensors(path, [value for value in graph.input if value.name not in weights])
    outputs = _tensors(path, graph.output)
    if unknown := sorted(inputs.keys() - plan.inputs.keys()):
        raise CheckpointError(f"{path}: nothing is known to give it as {unknown[0]!r}")
    for what, found, wanted in ("input", inputs, plan.inputs), ("output", outputs, plan.outputs):
        if missing := [name for name in wanted if name not in found]:
            raise CheckpointError(f"{path} has no {what} {missing[0]!r}: {_AGAIN}")
    sizes = {
        want: got
        for name, spec in plan.inputs.items()
        for want, got in zip(spec.shape, inputs[name][1], strict=False)
        if isinstance(want, str) and got is not None
    }
    fitted = (
        {name: _fitted(path, name, *found[name], spec) for name, spec in specs.items()}
        for found, specs in (
            (inputs, fix_dimensions(plan.inputs, sizes)),
            (outputs, fix_dimensions(plan.outputs, sizes)),
        )
    )
    return next(fitted), next(fitted), sizes


def _tensors(path: Path, values: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[str, Shape]]:
    """Dtypes by numpy's names, and shapes."""
    found = {}
    for value in values:
        kind = value.type.tensor_type
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        except (KeyError, ValueError):
            dtype = "nothing"
        if dtype not in DTYPES or not kind.HasField("shape"):
            raise CheckpointError(f"{path}: {value.name} is of a dtype or shape that we do not run")
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        found[value.name] = dtype, shape
    return found


def _fitted(path: Path, name: str, dtype: str, shape: Shape, want: TensorSpec) -> TensorSpec:
    """The plan's spec with the graph's dtype, if both can be had."""
    if name == "timestep":
        want = _timestep(path, dtype, shape)
    same = len(shape) == len(want.shape) and all(
        got in (None, size) for got, size in zip(shape, want.shape, strict=True)
    )
    if not same or not np.can_cast(want.dtype, dtype, "same_kind"):
        given = ", ".join("?" if size is None else str(size) for size in shape)
        raise CheckpointError(
            f"{path}: {name} is {dtype}[{given}], and by the config.json files {want}: {_AGAIN}"
        )
    return TensorSpec(dtype, want.shape)


def _timestep(path: Path, dtype: str, shape: Shape) -> TensorSpec:
    """optimum's is one number of a float type; older exports of it take a row of whole ones."""
    if whole := dtype in ("int32", "int64"):
        text = "%s takes whole timesteps: samplers that visit others lose the fraction, as there"
        _log.warning(text, path)
    return TensorSpec(dtype if whole else "float32", (1,) if shape else ())


def _is_half(graph: onnx.GraphProto) -> bool:
    values = (*graph.input, *graph.output)
    kinds = {value.type.tensor_type.elem_type for value in values}
    kinds |= {tensor.data_type for tensor in graph.initializer}
    return onnx.TensorProto.FLOAT16 in kinds


def _data_files(folder: Path, model: onnx.ModelProto) -> tuple[str, ...]:
    """The files beside the graph that it names anywhere, in subgraphs and functions too."""
    names = {
        {entry.key: entry.value for entry in part.external_data}.get("location", "")
        for part in _messages(model)
        if isinstance(part, onnx.TensorProto) and part.external_data
    }
    for name in names:
        pure = PurePosixPath(name)
        # An asterisk is onnxruntime's sign for an address in memory.
        wild = not name.isprintable() or "*" in name or str(pure) in (_MODEL, _CONFIG)
        if not pure.name or pure.is_absolute() or ".." in pure.parts or wild:
            raise CheckpointError(
                f"{folder / _MODEL} wants weights of {name!r}, which is no file of its folder"
            )
        _inside(folder, name)
    return tuple(sorted({str(PurePosixPath(name)) for name in names}))


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder, to which no link leads from there."""
    path = folder / name
    try:
        found, inside = path.is_file(), path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a name too long, links in a circle
        found, inside = False, True
    if not inside:
        raise CheckpointError(f"{path} is a link out of {folder}: put the file itself there")
    if not found:
        raise CheckpointError(f"no file {path}: {_AGAIN}")
    return path


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all those that it is made of."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)


# Writing ours


def check_layout(layout: Layout, name: str, plan: ExportPlan) -> None:
    """Refuse a layout that isn't there, and a model that none of optimum's pipelines runs.

    Raises:
        SettingsError: no such layout, or the UNet is not of diffusers.
    """
    if layout not in get_args(Layout):
        raise SettingsError(f"no layout {layout!r}; there are {', '.join(get_args(Layout))}")
    unet = _unet(plan)
    if layout == "optimum" and unet.folder != folder_of(unet.name):
        raise SettingsError(
            f"no pipeline of optimum's knows the UNet of {name}: export it without --layout optimum"
        )


def graph_file(name: str, layout: Layout) -> str:
    """Where a component's graph lies in the engine directory."""
    return f"{folder_of(name)}/{_MODEL}" if layout == "optimum" else f"{name}.onnx"


def folder_of(component: str) -> str:
    """Return the folder in which optimum's exports keep a component."""
    return "unet" if component == "denoiser" else component


def spaced(size: int | str) -> int | str:
    """A dimension as optimum's IO binding computes it, which knows names by the blanks around."""
    if isinstance(size, int):
        return size
    return size.replace("//", " / ").replace("*", " * ")


def with_outputs(plan: ExportPlan) -> ExportPlan:
    """The plan with all outputs of text encoders that optimum's have, in its order.

    Its pipelines take the first one to be the context, or the pooled output if there is one, and
    count hidden states from the first to the number in config.json.
    """
    return replace(plan, components=tuple(_with_outputs(part) for part in plan.components))


def _with_outputs(plan: ComponentPlan) -> ComponentPlan:
    if "input_ids" not in plan.inputs:
        return plan
    names = ["last_hidden_state"]
    if layers := [name for name in plan.outputs if name.startswith("hidden_states.")]:
        used = int(layers[0].partition(".")[2])  # what enters the last layer
        names += [f"hidden_states.{index}" for index in range(used + 2)]
    if "text_embeds" in plan.outputs:
        names.insert(0, "text_embeds")
    else:
        names.insert(1, "pooler_output")
    hidden = next(spec for spec in plan.outputs.values() if len(spec.shape) == 3)
    row = TensorSpec(hidden.dtype, (hidden.shape[0], hidden.shape[2]))
    known = {"pooler_output": row, **plan.outputs}
    outputs = {name: known.get(name, hidden) for name in names}
    return replace(plan, outputs=outputs, wrap=partial(TextEncoder, outputs=tuple(names)))


def write_companions(
    checkpoint: Checkpoint, plan: ExportPlan, components: Sequence[str], directory: Path
) -> None:
    """Write what optimum's pipelines read beside the graphs, and beside our tokenizer.json files.

    Raises:
        CheckpointError: a configuration or tokenizer of the checkpoint is missing or malformed.
    """
    for name in components:
        folder = folder_of(name)
        _write_json(directory / folder / _CONFIG, _config(checkpoint, plan, folder))
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    _write_json(directory / "scheduler" / "scheduler_config.json", _unnamed(scheduler))
    for folder in plan.tokenizers:
        _write_tokenizer(checkpoint, folder, directory / folder)
    index = _index(checkpoint, plan, str(scheduler.get("_class_name")))
    _write_json(directory / "model_index.json", index)


def _config(checkpoint: Checkpoint, plan: ExportPlan, name: str) -> dict[str, Any]:
    """The checkpoint's own, with what optimum guesses wrongly or warns of where it is left out."""
    config = _unnamed(checkpoint.config("vae" if name in _VAE else name))
    if name in _VAE:
        return {"scaling_factor": plan.latent.scaling_factor, **config}
    return {"time_cond_proj_dim": None, **config} if name == "unet" else config


def _unnamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the place that it came from, or a reference to code."""
    return {key: v for key, v in config.items() if key not in ("_name_or_path", "auto_map")}


def _index(checkpoint: Checkpoint, plan: ExportPlan, scheduler: str) -> dict[str, Any]:
    """model_index.json. Classes come from us: what is named here, optimum imports."""
    here = {folder_of(part.name) for part in plan.components} | {"vae", *plan.tokenizers}
    classes = {
        name: pair if name in here else (None, None)
        for name, pair in _CLASSES.items()
        if name in here or not name.endswith("_2")  # a refiner lacks the first of two
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
    """A CLIPTokenizer's files as transformers 4 reads them; 5 is content with tokenizer.json."""
    ours = json.loads((target / "tokenizer.json").read_bytes())
    words = special_tokens(checkpoint, folder)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": ours["truncation"]["max_length"],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in ours["added_tokens"]
        },
        **words,
    }
    _write_json(target / "tokenizer_config.json", config)
    _write_json(target / "special_tokens_map.json", words)
    source = [checkpoint.path / folder / name for name in ("vocab.json", "merges.txt")]
    if all(path.is_file() for path in source):
        for path in source:
            shutil.copyfile(path, target / path.name)
        return
    _write_json(target / "vocab.json", ours["model"]["vocab"])
    pairs = (" ".join(pair) for pair in ours["model"]["merges"])
    lines = ["#version: 0.2", *pairs]  # transformers 4 takes the first line for a comment
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _unet(plan: ExportPlan) -> ComponentPlan:
    return next(part for part in plan.components if part.name == "denoiser")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
