"""Self-attention over large grids with every second row and column of keys and values.

Attention costs the square of its tokens. Neighbours in an image are alike, so fewer keys and
values tell a query nearly the same: every other one of each axis is a quarter of the cost, and all
queries stay (ToDo, Smith et al. 2024, arXiv 2402.13573, after token merging, Bolya & Hoffman 2023,
arXiv 2303.17604, which looks for alike tokens and so costs more than it saves here). They are left
out before the projections to keys and values, each of which works on one token by itself.

That is no exact rewrite, so no pass of PASSES: it makes a component of its own, ``denoiser_reduced``.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph_io import DENOISER
from latentforge.optimize.partition.graph_analysis import ancestors, infer_shapes
from latentforge.optimize.partition.hoist import GraphPartition
from latentforge.optimize.passes.dims import dim
from latentforge.optimize.passes.matching import MICROSOFT, producer_of
from latentforge.optimize.passes.rewriting import Editor, remove_unused, scope_of
from latentforge.optimize.search.variants import extend, load_unet
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.kernels import DOMAIN
from latentforge.runtime.manifest import Manifest

__all__ = ["LEAST", "REDUCED", "STAGE", "add_reduced", "grids", "reduce_attention"]

REDUCED = f"{DENOISER}_reduced"
"""The component that takes and gives what the UNet's own does."""

STAGE = "reduced-attention"
"""The name in a manifest's history."""

LEAST = 2048
"""Tokens from which on it pays, by benchmarks/reduced_attention_speed.py."""

_FUSED = ((MICROSOFT, "MultiHeadAttention"), (DOMAIN, "Attention"))
_END = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class _SelfAttention:
    """What makes queries, keys and values of the same tokens.

    Attributes:
        tokens: (batch, height * width, channels).
        grid: of which they were made, (batch, height, width, channels).
        key, value: the projections, whose first input they are.
        fewer: what will have fewer tokens than the graph says.
    """

    tokens: ir.Value
    grid: ir.Value
    key: ir.Node
    value: ir.Node
    fewer: Sequence[ir.Value]


def add_reduced(source: Path, folder: Path, *, least: int = LEAST) -> Manifest:
    """Write engines into a folder, and with them REDUCED, the UNet with less attention.

    Args:
        source: an engine directory of graphs that were optimized for ONNX Runtime.
        folder: where to write; it is there and empty.
        least: see reduce_attention().

    Raises:
        ManifestError: the source is damaged, is not made of graphs, or has it already.
        SettingsError: there is no fused attention in which to do it.
    """
    start = time.perf_counter()
    _, part = load_unet(source, REDUCED)
    model = part.model.clone()
    if not (count := reduce_attention(model, least=least)):
        raise SettingsError(
            f"{source}: its {DENOISER} has no fused self-attention over an image; "
            "optimize it for the cpu target first"
        )
    return extend(
        source,
        folder,
        {REDUCED: replace(part, model=model)},
        name=STAGE,
        options={"min_tokens": least},
        measured={"attentions": float(count)},
        start=start,
    )


def reduce_attention(model: ir.Model, *, least: int = LEAST) -> int:
    """Give fused self-attention a quarter of its keys and values where it has many.

    Args:
        model: a graph of fused attention, which is edited.
        least: with fewer tokens than these an attention stays exact; that is decided when it runs.

    Returns:
        How many were changed.
    """
    editor, count = Editor(model.graph), 0
    for found in list(_self_attentions(model.graph)):
        fewer = _fewer(editor, found, least)
        for projection in (found.key, found.value):
            projection.replace_input_with(0, fewer)
        for value in found.fewer:
            value.shape = None
        count += 1
    remove_unused(model)
    return count


def grids(part: GraphPartition, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The tokens of each grid with fused self-attention, the finest first.

    Args:
        part: the UNet, or what is left of it for every step.
        sizes: of its free dimensions.
    """
    found = list(_self_attentions(part.model.graph))
    known = infer_shapes(part.model, part.inputs, sizes)
    sides = {known[str(each.grid.name)][1:3] for each in found}
    tokens = {math.prod(s for s in pair if isinstance(s, int)) for pair in sides}
    return tuple(sorted(tokens, reverse=True))


def _self_attentions(graph: ir.Graph) -> Iterator[_SelfAttention]:
    for node in graph:
        if (node.domain, node.op_type) not in _FUSED:
            continue
        query, key, value = (_projection(item) for item in node.inputs[:3])
        if query is None or key is None or value is None:
            continue
        tokens = query.inputs[0]
        if tokens is None or not (tokens is key.inputs[0] is value.inputs[0]):
            continue
        if (grid := _grid(graph, tokens)) is not None:
            fewer = [v for v in (*node.inputs[1:3], *key.outputs, *value.outputs) if v is not None]
            yield _SelfAttention(tokens=tokens, grid=grid, key=key, value=value, fewer=fewer)


def _projection(value: ir.Value | None) -> ir.Node | None:
    """The product that a key, query or value is of, with or without a bias."""
    biased = producer_of(value, "Add")
    found = [_product(item) for item in (biased.inputs if biased else [value])]
    return next((node for node in found if node is not None), None)


def _product(value: ir.Value | None) -> ir.Node | None:
    """A MatMul of ONNX, or one of ours that adds nothing which is as long as its tokens."""
    node = value.producer() if value is not None else None
    ours = node is not None and (node.domain, node.op_type) == (DOMAIN, "MatMul")
    if ours and node is not None and all(item is None for item in node.inputs[3:]):
        return node
    return producer_of(value, "MatMul")


def _grid(graph: ir.Graph, tokens: ir.Value) -> ir.Value | None:
    """What was laid out in a row to make tokens: the nearest before them."""
    known = ancestors(tokens)
    for node in reversed(list(graph)):
        if node.op_type == "Reshape" and node.outputs[0] in known and _flattens(node):
            return node.inputs[0]
    return None


def _flattens(node: ir.Node) -> bool:
    """Whether a Reshape makes (batch, tokens, channels) of (batch, height, width, channels)."""
    given, made = node.inputs[0], node.outputs[0]
    if given is None or given.shape is None or made.shape is None:
        return False
    ranks = len(given.shape), len(made.shape)
    return ranks == (4, 3) and isinstance(dim(given, 3), int) and dim(given, 3) == dim(made, 2)


def _fewer(editor: Editor, found: _SelfAttention, least: int) -> ir.Value:
    """Every second token of each axis of the grid if they are many, else all."""
    scope = scope_of(found.key)
    channels = int(dim(found.grid, 3))  # type: ignore[arg-type]

    def add(op_type: str, *inputs: ir.Value, like: ir.Value, **attributes: int) -> ir.Value:
        made = editor.add(op_type, inputs, before=found.key, attributes=attributes)
        made.type = like.type
        return made

    def numbers(name: str, *items: int) -> ir.Value:
        return editor.add_initializer(f"{scope}/{name}", np.array(items, np.int64))

    axes = numbers("axes", 1, 2)
    sides = add("Shape", found.grid, like=axes, start=1, end=3)
    count = add("ReduceProd", sides, like=axes, keepdims=1)
    many = add("GreaterOrEqual", count, numbers("least", least), like=axes)
    many.type = ir.TensorType(ir.DataType.BOOL)
    steps = add("Where", many, numbers("few", 2, 2), numbers("all", 1, 1), like=axes)
    shape = add("Concat", numbers("rows", 0), sides, numbers("width", channels), like=axes, axis=0)
    grid = add("Reshape", found.tokens, shape, like=found.tokens)
    starts, ends = numbers("starts", 0, 0), numbers("ends", _END, _END)
    picked = add("Slice", grid, starts, ends, axes, steps, like=found.tokens)
    return add("Reshape", picked, numbers("in_a_row", 0, -1, channels), like=found.tokens)
