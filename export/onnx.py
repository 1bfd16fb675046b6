"""Export of one torch module to one ONNX file, with torch.onnx's exporter on torch.export."""

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import nn

from latentforge.export.families.types import ComponentPlan
from latentforge.runtime.errors import CheckpointError, ShapeError
from latentforge.runtime.manifest import MAX_SIDE, Component, FileEntry
from latentforge.runtime.tensor import Feeds, TensorSpec, bind
from latentforge.runtime.text import one_line
from latentforge.runtime.validation import check_optional_count, plain

__all__ = [
    "OPSET",
    "Dimensions",
    "component_entry",
    "export_onnx",
    "fix_dimensions",
    "quick_slice_rule",
    "unchanged",
]

OPSET = 20
"""ONNX opset of the graphs: it has Gelu as one operator, and every target reads it."""

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key under which torch lists a node's enclosing modules, and its own name last."""

_INLINE_LIMIT = 256_000_000
"""Largest total size of weights, in bytes, that are stored inside the ONNX file.

protobuf is limited to 2 GiB, and far below that costs three copies of the weights in memory.
"""


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Sizes that the graphs are fixed to; None leaves a dimension free.

    Attributes:
        batch: rows of one engine run; classifier-free guidance takes two rows per image.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Raises:
        SettingsError: a size is not a positive integer.
    """

    batch: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "height", "width"):
            object.__setattr__(self, name, plain(getattr(self, name)))
            check_optional_count(name, getattr(self, name), MAX_SIDE)

    def sizes(self, downscale: int) -> dict[str, int]:
        """Return the fixed sizes by the names that tensor specs use.

        Args:
            downscale: pixels per latent, along one side.
        """
        sizes = {
            "batch": self.batch,
            "height": self.height,
            "width": self.width,
            "latent_height": self.height and self.height // downscale,
            "latent_width": self.width and self.width // downscale,
        }
        return {name: size for name, size in sizes.items() if size is not None}


def fix_dimensions(
    specs: Mapping[str, TensorSpec], sizes: Mapping[str, int]
) -> dict[str, TensorSpec]:
    """Replace free dimensions of tensor specs by fixed sizes, also inside ``h*8`` and ``h//8``."""

    def fixed(size: int | str) -> int | str:
        free = isinstance(size, str) and size.split("*")[0].split("//")[0] not in sizes
        return size if free else TensorSpec("int8", (size,)).resolve(sizes)[0]

    return {
        name: TensorSpec(spec.dtype, tuple(map(fixed, spec.shape))) for name, spec in specs.items()
    }


def unchanged(size: int | str) -> int | str:
    """Write a dimension into the file as the manifest has it."""
    return size


def export_onnx(
    module: nn.Module,
    plan: ComponentPlan,
    feeds: Feeds,
    target: Path,
    sizes: Mapping[str, int],
    *,
    format_size: Callable[[int | str], int | str] = unchanged,
) -> None:
    """Export the module to the ONNX file ``target``; large weights go to ``target``.data.

    The module cannot be used afterwards: its weights are freed.

    Args:
        module: the module that plan.load returned.
        plan: names, dtypes and free dimensions of its inputs and outputs.
        feeds: recorded inputs to trace it with.
        target: the ONNX file to write.
        sizes: dimensions to fix, by name.
        format_size: returns a dimension of the manifest as the file should have it.

    Raises:
        ShapeError: the feeds do not fit the plan.
        CheckpointError: torch's exporter fails on the module.
    """
    inputs, outputs = fix_dimensions(plan.inputs, sizes), fix_dimensions(plan.outputs, sizes)
    bind(plan.inputs, feeds)
    program = _traced(module, plan, _tracing_inputs(inputs, feeds), inputs, list(outputs))
    shapes = {
        name: ir.Shape([format_size(size) for size in spec.shape])
        for name, spec in {**inputs, **outputs}.items()
    }
    model = _cleaned(program.model, plan.name, shapes)
    size = sum(_bytes(value) for value in model.graph.initializers.values())
    ir.save(model, target, external_data=f"{target.name}.data" if size > _INLINE_LIMIT else None)
    _drop_weights(program, module)


def _traced(
    module: nn.Module,
    plan: ComponentPlan,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    inputs: Mapping[str, TensorSpec],
    outputs: list[str],
) -> torch.onnx.ONNXProgram:
    """Return torch's ONNX program of a module, traced with arrays."""
    try:
        with _quiet(), quick_slice_rule():
            program = torch.onnx.export(
                module,
                kwargs={name: torch.from_numpy(array) for name, array in arrays.items()},
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=_dynamic_shapes(inputs, plan.multiples),
                input_names=list(inputs),
                output_names=outputs,
                verbose=False,
            )
    except Exception as error:  # of the exporter's stages or of the module; there is no common one
        raise CheckpointError(
            f"torch cannot export {plan.name} to ONNX: {one_line(error)}: try fixed sizes, with "
            "--height, --width and --batch"
        ) from error
    assert program is not None  # only the TorchScript exporter returns None
    return program


def component_entry(
    plan: ComponentPlan, path: Path, directory: Path, sizes: Mapping[str, int]
) -> Component:
    """Return the manifest entry of an exported graph.

    Args:
        plan: the component's plan.
        path: the ONNX file; ``path``.data holds its weights if it exists.
        directory: the engine directory.
        sizes: fixed dimensions, by name.
    """
    data = path.with_name(f"{path.name}.data")
    weights = (FileEntry.of(data, directory),) if data.exists() else ()
    main = FileEntry.of(path, directory)
    return Component(
        file=main.file,
        sha256=main.sha256,
        bytes=main.bytes,
        data=weights,
        backend="onnxruntime",
        precision="fp32",
        inputs=fix_dimensions(plan.inputs, sizes),
        outputs=fix_dimensions(plan.outputs, sizes),
        overflows_fp16=plan.overflows_fp16,
    )


def _drop_weights(program: torch.onnx.ONNXProgram, module: nn.Module) -> None:
    """Free the weights explicitly: torch keeps exported graphs until the process ends."""
    exported = program.exported_program
    kept = list(exported.state_dict.values()) if exported is not None else []
    for weight in (*module.parameters(), *kept):
        weight.data = torch.empty(0)
    for value in program.model.graph.initializers.values():
        value.const_value = None


def _bytes(weight: ir.Value) -> int:
    return int(weight.const_value.nbytes) if weight.const_value is not None else 0


def _tracing_inputs(
    specs: Mapping[str, TensorSpec], feeds: Feeds
) -> dict[str, np.ndarray[Any, Any]]:
    """Repeat the feeds to two rows if the batch is free: torch.export makes one row a constant."""
    arrays = {}
    for name, spec in specs.items():
        rows = 2 if spec.shape[0] == "batch" else int(spec.shape[0])
        repeats = -(-rows // len(feeds[name]))
        arrays[name] = np.concatenate([feeds[name]] * repeats)[:rows]
        for size, got in zip(spec.shape, arrays[name].shape, strict=True):
            if isinstance(size, int) and size != got:
                raise ShapeError(
                    f"{name}: the recorded input is {arrays[name].shape}, but the graph is fixed "
                    f"to {spec}"
                )
    return arrays


def _dynamic_shapes(
    specs: Mapping[str, TensorSpec], multiples: Mapping[str, int]
) -> dict[str, dict[int, Any]]:
    """Return the free dimensions of each input for torch.export, with one Dim per name."""
    names = {size for spec in specs.values() for size in spec.shape if isinstance(size, str)}
    dims = {name: _dim(name, multiples.get(name, 1)) for name in names}
    return {
        name: {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for name, spec in specs.items()
    }


def _dim(name: str, factor: int) -> Any:
    if factor > 1:
        return factor * torch.export.Dim(f"{name}_units")
    # From 64 rows on, diffusers copies tensors in one place. The graph is the same, but without
    # an upper limit torch specializes on that branch and traces twice.
    return torch.export.Dim(name, max=63) if name == "batch" else torch.export.Dim(name)


def _cleaned(model: ir.Model, name: str, shapes: Mapping[str, ir.Shape]) -> ir.Model:
    """Name the graph and its nodes, set the shapes, and remove metadata about this machine."""
    model.graph.name = name
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = shapes[str(value.name)]
    model.metadata_props.clear()
    _name_nodes(model.graph)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()  # stack traces with local paths
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name = "latentforge"
    model.doc_string = None
    return model


def _name_nodes(graph: ir.Graph) -> None:
    """Name each node after its module, such as ``mid_block.attentions.0.proj_in/Conv``.

    Profiles, recipes and reports name layers by these.
    """
    counts: Counter[str] = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['', '']"))
        name = f"{scopes[-2].removeprefix('model.')}/{node.op_type}".lstrip("/")
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"


@contextlib.contextmanager
def quick_slice_rule() -> Iterator[None]:
    """Let onnxscript look for two Slices to join only where there is one.

    Its rule of two outputs lists all nodes of the graph at each node, which takes a fifth of the
    export of a tiny UNet, and grows with the square of the nodes. It finds the same.
    """
    everywhere = slice_split_rule.try_rewrite

    def at_slices(model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any) -> Any:
        return everywhere(model, graph, node, **options) if node.op_type == "Slice" else None

    slice_split_rule.try_rewrite = at_slices
    try:
        yield
    finally:
        slice_split_rule.try_rewrite = everywhere


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about its own internals; errors still propagate."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
