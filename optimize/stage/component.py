"""One component's graph, taken through a recipe."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import onnx_ir as ir

from latentforge.optimize.graph_io import DENOISER, save_graph
from latentforge.optimize.half import compute_half, store_half
from latentforge.optimize.partition.hoist import GraphPartition, hoist
from latentforge.optimize.passes import PASSES
from latentforge.optimize.passes.runner import optimize
from latentforge.optimize.prune.pruning import prune
from latentforge.optimize.prune.sparsity import sparsify
from latentforge.optimize.quantize.nodes import check_float
from latentforge.optimize.quantize.qdq import quantize
from latentforge.optimize.quantize.weights import quantize_weights
from latentforge.optimize.recipe import Precision, Recipe
from latentforge.optimize.targets import Target
from latentforge.runtime.kernels import DOMAIN
from latentforge.runtime.manifest import Component, FileEntry
from latentforge.runtime.tensor import Feeds

__all__ = ["Rewriter", "Rewritten", "save_part"]

_BEFORE_PRUNING = ("fold-constants", "fuse-attention")  # others hide the residual sums


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """What a component became.

    Attributes:
        parts: graphs by component: the UNet may have been cut into several.
        precision: as asked for.
        counts: rewrites by pass.
        nodes: before and after, those of all parts together.
    """

    parts: Mapping[str, GraphPartition | None]
    precision: Precision
    counts: Counter[str]
    nodes: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Rewriter:
    """Takes graphs through a recipe.

    Attributes:
        recipe: what to do.
        target: what the result is for.
        feeds: recorded inputs by component, as far as the recipe asks for them.
        portable: leave out what only the target can run, so that a gate can run here.
    """

    recipe: Recipe
    target: Target
    feeds: Mapping[str, Sequence[Feeds]]
    portable: bool = False

    def rewrite(self, name: str, model: ir.Model, component: Component) -> Rewritten:
        """Fuse, prune, quantize, cut and convert one component's graph, which is used up."""
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
            counts.update(self._finish(part.model, precision))
            counts.update(self._halve(part.model, precision, component))
        after = sum(len(part.model.graph) for part in parts.values())
        return Rewritten(parts=parts, precision=precision, counts=counts, nodes=(before, after))

    def fuse(self, model: ir.Model, precision: Precision, *, half: bool) -> Counter[str]:
        """Run the target's passes, but for those that this precision rules out."""
        passes = self.target.portable_passes if self.portable else self.target.passes
        unfit = set(self.recipe.skip)
        if not half:
            unfit.add("pack-attention")  # whose kernels are in half alone
        if precision not in ("fp32", "fp16"):
            unfit.add("nhwc-conv")  # which takes no quantized weights
        return optimize(model, {name: PASSES[name] for name in passes if name not in unfit})

    def _computes_half(self, precision: Precision, component: Component) -> bool:
        return self.target.half and precision != "fp32" and not component.overflows_fp16

    def _prune(self, model: ir.Model) -> Counter[str]:
        """Take out what the recipe says, before fusion hides where branches end."""
        recipe, counts = self.recipe, Counter[str]()
        feeds = self.feeds.get(DENOISER, ())
        if recipe.prune is not None:
            passes = [n for n in _BEFORE_PRUNING if n in self.target.passes]
            optimize(model, {n: PASSES[n] for n in passes if n not in recipe.skip})
            for removed in prune(model, recipe.prune, feeds=feeds):
                counts[f"prune-{removed.kind}"] += 1
        if recipe.sparsity is not None:
            made = sparsify(model, recipe.sparsity, feeds=feeds)
            counts["sparsify"] = len(made)
        return counts

    def _quantize(self, name: str, precision: Precision, model: ir.Model) -> Counter[str]:
        if not self.recipe.quantizes(name):
            return Counter()
        check_float(model)
        if precision == "int8":
            counts = quantize(model, self.feeds[name], self.recipe.int8, self.target.form)
            return Counter({f"int8-{kind}": count for kind, count in counts.items()})
        bits: Literal[4, 8] = 4 if precision == "int4-weights" else 8
        made = quantize_weights(model, self.recipe.weight_only, self.target.form, bits=bits)
        return Counter({precision: made})

    def _finish(self, model: ir.Model, precision: Precision) -> Counter[str]:
        """Run the target's last passes, which other analyses don't look behind."""
        if precision not in ("fp32", "fp16"):  # what is quantized keeps its layout
            return Counter()
        names = [name for name in self.target.post_partition_passes if name not in self.recipe.skip]
        return optimize(model, {name: PASSES[name] for name in names})

    def _halve(self, model: ir.Model, precision: Precision, component: Component) -> Counter[str]:
        """Compute in half where target and model can, and store what is left in half."""
        counts = Counter[str]()
        if self._computes_half(precision, component):
            counts["compute-half"] = compute_half(model)
        if precision != "fp32":
            counts["store-half"] = store_half(model)
        return counts


def save_part(name: str, part: GraphPartition, component: Component, folder: Path) -> Component:
    """Write a part of a component as NAME.onnx into a folder, and describe it."""
    path = folder / f"{name}.onnx"
    save_graph(part.model, path)
    data = path.with_name(f"{path.name}.data")
    main = FileEntry.of(path, folder)
    return msgspec.structs.replace(
        component,
        file=main.file,
        sha256=main.sha256,
        bytes=main.bytes,
        data=(FileEntry.of(data, folder),) if data.exists() else (),
        inputs=part.inputs,
        outputs=part.outputs,
        custom_ops=any(node.domain == DOMAIN for node in part.model.graph),
    )
