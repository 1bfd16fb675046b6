"""Self-attention over large grids with every second row and column of the keys and values.

The cost of self-attention grows with the square of the number of tokens. Neighbouring tokens of an
image are similar, so a subset of the keys and values gives almost the same result. Taking every
second token along both axes of the grid leaves a quarter of the cost; all queries are kept. This is
ToDo (Smith et al. 2024, arXiv 2402.13573). Token merging (Bolya & Hoffman 2023, arXiv 2303.17604)
searches for similar tokens instead, which costs more than it saves here. The tokens are dropped
before the projections to keys and values, which process each token separately:

    before                                after

    grid (b, h, w, c)                     grid
      | Reshape                             | Reshape
    tokens (b, h*w, c)                    tokens ---------+
      |       |        |                    |             | Reshape to (b, h, w, c)
      |       |        |                    |             | Slice [::2, ::2]
      |       |        |                    |             | Reshape to (b, h*w/4, c)
    to_q    to_k     to_v                 to_q        +---+---+
      |       |        |                    |       to_k    to_v
      Attention(q, k, v)                    Attention(q, k, v)

The step of the Slice is 2 or 1, decided at run time by the number of tokens.

This changes the result, so it is not one of PASSES: it makes a separate component,
``denoiser_reduced``.
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
from latentforge.optimize.search.variants import add_components, load_denoiser
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.kernels import DOMAIN
from latentforge.runtime.manifest import Manifest

__all__ = [
    "MIN_TOKENS",
    "REDUCED",
    "STAGE",
    "add_reduced_attention",
    "grid_tokens",
    "reduce_attention",
]

REDUCED = f"{DENOISER}_reduced"
"""Component with reduced attention; its inputs and outputs are those of the denoiser."""

STAGE = "reduced-attention"
"""Name of the stage in the history of a manifest."""

MIN_TOKENS = 2048
"""Number of tokens from which it pays, by benchmarks/reduced_attention_speed.py."""

_FUSED = ((MICROSOFT, "MultiHeadAttention"), (DOMAIN, "Attention"))
_END = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class _SelfAttention:
    """Self-attention node whose queries, keys and values are projections of the same tokens.

    Attributes:
        tokens: (batch, height * width, channels).
        grid: source of the tokens, (batch, height, width, channels).
        key, value: projections; the tokens are their first input.
        shortened: values that will have fewer tokens than their shape in the graph says.
    """

    tokens: ir.Value
    grid: ir.Value
    key: ir.Node
    value: ir.Node
    shortened: Sequence[ir.Value]


def add_reduced_attention(source: Path, folder: Path, *, min_tokens: int = MIN_TOKENS) -> Manifest:
    """Write engines with the additional component REDUCED into a folder.

    Args:
        source: an engine directory of graphs that were optimized for ONNX Runtime.
        folder: existing and empty.
        min_tokens: see reduce_attention().

    Returns:
        The manifest that was written. Its last stage has the number of ``attentions`` changed.

    Raises:
        ManifestError: the source is damaged, has no graph of the denoiser, or already has REDUCED.
        SettingsError: the graph has no fused self-attention over an image.
    """
    start = time.perf_counter()
    _, part = load_denoiser(source, REDUCED)
    model = part.model.clone()
    if not (count := reduce_attention(model, min_tokens=min_tokens)):
        raise SettingsError(
            f"{source}: its {DENOISER} has no fused self-attention over an image; "
            "optimize it for the cpu target first"
        )
    return add_components(
        source,
        folder,
        {REDUCED: replace(part, model=model)},
        name=STAGE,
        options={"min_tokens": min_tokens},
        measured={"attentions": float(count)},
        start=start,
    )


def reduce_attention(model: ir.Model, *, min_tokens: int = MIN_TOKENS) -> int:
    """Give self-attention a quarter of its keys and values where it has many.

    Args:
        model: a graph with fused attention, which is edited in place.
        min_tokens: an attention over fewer tokens keeps all of them; decided at run time.

    Returns:
        The number of attention nodes changed.
    """
    editor, count = Editor(model.graph), 0
    for attention in list(_self_attentions(model.graph)):
        tokens = _subsample(editor, attention, min_tokens)
        for projection in (attention.key, attention.value):
            projection.replace_input_with(0, tokens)
        for value in attention.shortened:
            value.shape = None
        count += 1
    remove_unused(model)
    return count


def grid_tokens(part: GraphPartition, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the number of tokens of each grid with fused self-attention, in decreasing order.

    Args:
        part: the denoiser, or the part of it that runs at every step.
        sizes: values of its free dimensions.
    """
    attentions = list(_self_attentions(part.model.graph))
    shapes = infer_shapes(part.model, part.inputs, sizes)
    sides = {shapes[str(attention.grid.name)][1:3] for attention in attentions}
    tokens = {math.prod(s for s in pair if isinstance(s, int)) for pair in sides}
    return tuple(sorted(tokens, reverse=True))


def _self_attentions(graph: ir.Graph) -> Iterator[_SelfAttention]:
    """Yield the fused self-attention nodes over an image, in the order of the graph."""
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
            values = (*node.inputs[1:3], *key.outputs, *value.outputs)
            shortened = [v for v in values if v is not None]
            yield _SelfAttention(
                tokens=tokens, grid=grid, key=key, value=value, shortened=shortened
            )


def _projection(value: ir.Value | None) -> ir.Node | None:
    """Return the matrix product that computes a query, key or value, with or without a bias."""
    biased = producer_of(value, "Add")
    products = [_product(item) for item in (biased.inputs if biased else [value])]
    return next((node for node in products if node is not None), None)


def _product(value: ir.Value | None) -> ir.Node | None:
    """Return the MatMul that makes a value: ONNX's, or the native one without per-token addends."""
    node = value.producer() if value is not None else None
    native = node is not None and (node.domain, node.op_type) == (DOMAIN, "MatMul")
    if native and node is not None and all(item is None for item in node.inputs[3:]):
        return node
    return producer_of(value, "MatMul")


def _grid(graph: ir.Graph, tokens: ir.Value) -> ir.Value | None:
    """Return the nearest grid that the tokens were flattened from."""
    upstream = ancestors(tokens)
    for node in reversed(list(graph)):
        if node.op_type == "Reshape" and node.outputs[0] in upstream and _flattens(node):
            return node.inputs[0]
    return None


def _flattens(node: ir.Node) -> bool:
    """Return True if a Reshape flattens (batch, height, width, channels) to tokens."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return False
    ranks, channels = (len(source.shape), len(result.shape)), dim(source, 3)
    return ranks == (4, 3) and isinstance(channels, int) and channels == dim(result, 2)


def _subsample(editor: Editor, attention: _SelfAttention, min_tokens: int) -> ir.Value:
    """Add nodes that take every second token along both axes, or all if there are few."""
    scope = scope_of(attention.key)
    channels = int(dim(attention.grid, 3))  # type: ignore[arg-type]

    def add(op_type: str, *inputs: ir.Value, like: ir.Value, **attributes: int) -> ir.Value:
        output = editor.add(op_type, inputs, before=attention.key, attributes=attributes)
        output.type = like.type
        return output

    def constant(name: str, *items: int) -> ir.Value:
        return editor.add_initializer(f"{scope}/{name}", np.array(items, np.int64))

    tokens, axes = attention.tokens, constant("axes", 1, 2)
    sides = add("Shape", attention.grid, like=axes, start=1, end=3)
    count = add("ReduceProd", sides, like=axes, keepdims=1)
    is_large = add("GreaterOrEqual", count, constant("min_tokens", min_tokens), like=axes)
    is_large.type = ir.TensorType(ir.DataType.BOOL)
    steps = add("Where", is_large, constant("second", 2, 2), constant("every", 1, 1), like=axes)
    shape = add(
        "Concat", constant("rows", 0), sides, constant("width", channels), like=axes, axis=0
    )
    grid = add("Reshape", tokens, shape, like=tokens)
    starts, ends = constant("starts", 0, 0), constant("ends", _END, _END)
    subset = add("Slice", grid, starts, ends, axes, steps, like=tokens)
    return add("Reshape", subset, constant("flat", 0, -1, channels), like=tokens)
