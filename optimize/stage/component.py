"""Rewriting of one component's graph by a recipe."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import onnx_ir as ir

from latentforge.optimize.graph_io import DENOISER, save_graph
from latentforge.optimize.half import compute_bf16, compute_half, store_half, stored_precision
from latentforge.optimize.partition.hoist import GraphPartition, hoist
from latentforge.optimize.passes import PASSES
from latentforge.optimize.passes.runner import optimize
from latentforge.optimize.prune.pruning import prune
from latentforge.optimize.prune.sparsity import sparsify
from latentforge.optimize.quantize.nodes import check_float
from latentforge.optimize.quantize.qdq import quantize
from latentforge.optimize.quantize.weights import quantize_weights
from latentforge.optimize.recipe import FLOATS, Precision, Recipe
from latentforge.optimize.targets import Target
from latentforge.runtime.kernels import DOMAIN
from latentforge.runtime.manifest import Component, FileEntry
from latentforge.runtime.tensor import Feeds

__all__ = ["Rewriter", "Rewritten", "save_part"]

_BEFORE_PRUNING = ("fold-constants", "fuse-attention")  # others hide the residual sums


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """Result of rewriting a component.

    Attributes:
        parts: graphs by component, since the denoiser may have been partitioned; None once freed.
        precision: of the recipe.
        counts: number of rewrites by pass.
        nodes: before and after, of all parts together.
    """

    parts: Mapping[str, GraphPartition | None]
    precision: Precision
    counts: Counter[str]
    nodes: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Rewriter:
    """Rewriter of graphs by a recipe.

    Attributes:
        recipe: to carry out.
        target: that the result is for.
        feeds: recorded inputs by component, where the recipe needs them.
        portable: leave out passes whose operators only the target runs, so that this machine can
            run the gate.
    """

    recipe: Recipe
    target: Target
    feeds: Mapping[str, Sequence[Feeds]]
    portable: bool = False

    def rewrite(self, name: str, model: ir.Model, component: Component) -> Rewritten:
        """Prune, fuse, quantize, partition and convert one component's graph, which is consumed."""
        before, counts = len(model.graph), Counter[str]()
        precision = self.recipe.precision_of(name)
        if name == DENOISER:
            counts.update(self._prune(model))
        counts.update(self.fuse(model, precision, half=self._computes_half(precision, component)))
        counts.update(self._quantize(name, precision, model))
        parts = {name: GraphPartition.whole(model, component)}
        if name == DENOISER and self.recipe.hoist_invariants:
            hoisted = hoist(model, component.inputs)
            parts = hoisted.parts(name)
            counts.update(hoisted.counts)
        for part in parts.values():
            counts.update(self._run_post_partition(part.model, precision))
            counts.update(self._convert_to_half(part.model, precision, component))
        after = sum(len(part.model.graph) for part in parts.values())
        return Rewritten(parts=parts, precision=precision, counts=counts, nodes=(before, after))

    def fuse(self, model: ir.Model, precision: Precision, *, half: bool) -> Counter[str]:
        """Run the target's passes, except those that do not support this precision."""
        passes = self.target.portable_passes if self.portable else self.target.passes
        unfit = set(self.recipe.skip)
        if not half:
            unfit.add("pack-attention")  # its kernels are fp16 only
        if precision not in FLOATS:
            unfit.add("nhwc-conv")  # it does not support quantized weights
        return optimize(model, {name: PASSES[name] for name in passes if name not in unfit})

    def _computes_half(self, precision: Precision, component: Component) -> bool:
        return self.target.half and precision != "fp32" and not component.overflows_fp16

    def _prune(self, model: ir.Model) -> Counter[str]:
        """Prune before fusion, which would hide where residual branches end."""
        recipe, counts = self.recipe, Counter[str]()
        feeds = self.feeds.get(DENOISER, ())
        if recipe.prune is not None:
            passes = [n for n in _BEFORE_PRUNING if n in self.target.passes]
            optimize(model, {n: PASSES[n] for n in passes if n not in recipe.skip})
            for removed in prune(model, recipe.prune, feeds=feeds):
                counts[f"prune-{removed.kind}"] += 1
        if recipe.sparsity is not None:
            counts["sparsify"] = len(sparsify(model, recipe.sparsity, feeds=feeds))
        return counts

    def _quantize(self, name: str, precision: Precision, model: ir.Model) -> Counter[str]:
        if not self.recipe.quantizes(name):
            return Counter()
        check_float(model)
        if precision == "int8":
            settings = self.target.int8_settings(self.recipe.int8)
            counts = quantize(model, self.feeds[name], settings, self.target.form)
            return Counter({f"int8-{kind}": count for kind, count in counts.items()})
        bits: Literal[4, 8] = 4 if precision == "int4-weights" else 8
        count = quantize_weights(model, self.recipe.weight_only, self.target.form, bits=bits)
        return Counter({precision: count})

    def _run_post_partition(self, model: ir.Model, precision: Precision) -> Counter[str]:
        """Run the passes after partitioning, whose analysis does not know their operators."""
        if precision not in FLOATS:  # quantized graphs keep their layout
            return Counter()
        names = [name for name in self.target.post_partition_passes if name not in self.recipe.skip]
        return optimize(model, {name: PASSES[name] for name in names})

    def _convert_to_half(
        self, model: ir.Model, precision: Precision, component: Component
    ) -> Counter[str]:
        """Convert to half precision where supported, and other weights to fp16 storage."""
        counts = Counter[str]()
        if self._computes_half(precision, component):
            counts["compute-half"] = compute_half(model)
        if precision == "bf16":
            counts["compute-bf16"] = compute_bf16(model)
        if precision != "fp32":
            counts["store-half"] = store_half(model)
        return counts


def save_part(name: str, part: GraphPartition, component: Component, folder: Path) -> Component:
    """Write a part of a component as NAME.onnx into a folder, and return its manifest entry."""
    path = folder / f"{name}.onnx"
    save_graph(part.model, path)
    data = path.with_name(f"{path.name}.data")
    main = FileEntry.of(path, folder)
    return msgspec.structs.replace(
        component,
        file=main.file,
        sha256=main.sha256,
        bytes=main.bytes,
        precision=stored_precision(part.model, component.precision),
        data=(FileEntry.of(data, folder),) if data.exists() else (),
        inputs=part.inputs,
        outputs=part.outputs,
        custom_ops=any(node.domain == DOMAIN for node in part.model.graph),
    )
