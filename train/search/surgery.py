"""Structures applied to the exported graph of a whole UNet, without another export.

Nodes are named after the modules whose forward pass made them, so that a site's names lead to the
value that enters it and the value that leaves it. What is dropped is bypassed, and becomes dead
code:

    before                                          after

    x ─┬─► norm1 ─► conv1 ─► ... ─► conv2 ─► Add    x ─► (users of Add)
       └────────────────────────────────────┘

In an up block the bypass begins at the hidden state, which Concat joins to the skip connection.
What is halved is sliced: weights, norms, and sizes in Reshapes.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from latentforge.export.models.searched_structure import (
    Choice,
    Importance,
    Kept,
    Repair,
    SearchedStructure,
    Site,
    half,
    half_channels,
)
from latentforge.optimize.graph import GraphLayer, constant, layers, module
from latentforge.optimize.prune.channels import Mlp, mlps, narrow_channels
from latentforge.optimize.prune.heads import Attention, attentions, narrow_heads
from latentforge.optimize.prune.slicing import Indices, replace, take, take_outputs
from latentforge.runtime.errors import ManifestError

__all__ = ["restructure", "signatures"]

_PARTS: Mapping[Choice, tuple[str, ...]] = {
    "no_self_attention": ("attn1",),
    "no_feed_forward": ("ff",),
    "cross_attention": ("attn1", "ff"),
}
"""Parts of a transformer block that a choice leaves out."""

_ORDER = ("attn1", "attn2", "ff")
"""Parts of a transformer block in the order of their residual sums; the norm in front of each is
norm1, norm2, norm3."""


def restructure(
    model: ir.Model,
    structure: SearchedStructure,
    sites: Sequence[Site],
    importance: Importance | None = None,
) -> None:
    """Give the exported graph of a whole UNet a structure, in place.

    Args:
        model: as export wrote it; no pass has changed it.
        structure: of these sites.
        sites: of the UNet.
        importance: what halves keep, and repairs. Without it they keep the first parts, for which
            the graph is as fast, but not as good.

    Raises:
        ManifestError: the graph's nodes are not named after diffusers' modules.
    """
    graph = _UNetGraph(model.graph)
    halved = [name for name, choice in structure.choices.items() if choice == "half"]
    for name in halved:
        kept = Kept() if importance is None else importance[name]
        if ".transformer_blocks." in name:
            graph.halve_transformer_block(name, kept)
        else:
            graph.halve_resnet(name, kept)
    for site in sites:
        choice = structure.choice(site.name)
        if choice == "drop":
            graph.drop(site)
        for part in _PARTS.get(choice, ()):
            graph.drop_part(site.name, part)
    for name in _empty_attentions(structure, sites):
        graph.drop_attention(name)
    for name, choice in structure.choices.items():
        if importance is not None and name in importance and choice in importance[name].repairs:
            graph.repair(importance[name].repairs[choice])
    common.RemoveUnusedNodesPass()(model)
    if halved:
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def _empty_attentions(structure: SearchedStructure, sites: Sequence[Site]) -> list[str]:
    """Return the names of the attention modules all of whose transformer blocks are dropped."""
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        if site.kind == "transformer_block":
            name = site.name.partition(".transformer_blocks.")[0]
            blocks.setdefault(name, []).append(site)
    return [
        name
        for name, own in blocks.items()
        if all(structure.choice(site.name) == "drop" for site in own)
    ]


def signatures(graph: ir.Graph, sites: Sequence[Site]) -> dict[str, str]:
    """Return a text by name of the site that is equal for sites whose layers have equal shapes.

    Args:
        graph: of the whole UNet.
        sites: of the UNet.
    """
    texts: dict[str, list[str]] = {site.name: [] for site in sites if site.kind != "stage"}
    for layer in layers(graph):
        for name in _enclosing(layer.name):
            if name in texts:
                texts[name].append(
                    f"{layer.node.op_type} {layer.weight.shape} {layer.output.shape}"
                )
    unique = {site.name: [site.name] for site in sites if site.kind == "stage"}
    digests = {name: "\n".join(lines) for name, lines in {**texts, **unique}.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in digests.items()}


def _enclosing(name: str) -> list[str]:
    """Return the modules that contain a node, by its name: ``a``, ``a.b`` for ``a.b/MatMul``."""
    parts = module(name).split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


class _UNetGraph:
    """Graph of a whole UNet, by the modules that its nodes are named after."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._nodes: dict[str, list[ir.Node]] = {}
        self._layers: dict[str, GraphLayer] = {}
        self._attentions: dict[str, Attention] = {}
        self._mlps: dict[str, Mlp] = {}
        for node in graph:
            self._nodes.setdefault(module(str(node.name)), []).append(node)

    def drop(self, site: Site) -> None:
        """Bypass a resnet, a transformer block or a stage."""
        if site.kind == "resnet":
            self._bypass(self._hidden(site.name), self._last(site.name))
        elif site.kind == "transformer_block":
            for part in _ORDER:
                self.drop_part(site.name, part)
        else:
            front = site.name.rpartition(".")[0] + f".{int(site.name.rpartition('.')[2]) - 1}"
            entering = self._within(f"{front}.downsamplers.0")[0].inputs[0]
            leaving = self._within("up_blocks.0.upsamplers.0")[-1]
            self._bypass(entering, leaving.outputs[0])

    def drop_part(self, block: str, part: str) -> None:
        """Bypass the attention or the feed-forward of a transformer block."""
        index = _ORDER.index(part)
        sums = [node for node in self._own(block) if node.op_type == "Add"]
        if len(sums) != len(_ORDER):
            raise _foreign(block)
        self._bypass(self._entering(f"{block}.norm{index + 1}"), sums[index].outputs[0])

    def drop_attention(self, name: str) -> None:
        """Bypass an attention module, with its norm and projections."""
        self._bypass(self._entering(f"{name}.norm"), self._last(name))

    def repair(self, repair: Repair) -> None:
        """Change weights to make up for what a choice leaves out."""
        for path, values in repair.replaced.items():
            node = self._layer(path.rpartition(".")[0]).node
            replace(self._graph, node, 1, values)
        for path, values in repair.added.items():
            node, index = self._bias(path.rpartition(".")[0])
            old = constant(node.inputs[index])
            assert old is not None
            replace(self._graph, node, index, old.astype(np.float32) + values)

    def _bias(self, name: str) -> tuple[ir.Node, int]:
        """Return the node that adds a layer's bias, and the input that holds it."""
        for node in self._own(name):
            if node.op_type == "Conv" and len(node.inputs) > 2:
                return node, 2
            if node.op_type == "Add":
                return node, int(constant(node.inputs[1]) is not None)
        raise _foreign(name)

    def halve_resnet(self, name: str, kept: Kept) -> None:
        """Halve the channels between a resnet's convolutions, by groups of its second norm."""
        conv1, time, conv2 = (
            self._layer(f"{name}.{part}") for part in ("conv1", "time_emb_proj", "conv2")
        )
        count, width = self._groups(f"{name}.norm2"), conv1.array.shape[conv1.out_axis]
        groups = _indices(kept.groups, half(count))
        channels = _spread(groups, width // count)
        for node in _between([conv1.output, time.output], conv2.node):
            _narrow_node(self._graph, node, {width: channels, count: groups})
        take_outputs(self._graph, time, channels)
        for index in (1, 2):  # weight and bias
            take(self._graph, conv1.node, index, channels, 0)
        take(self._graph, conv2.node, 1, channels, 1)
        conv1.output.shape = time.output.shape = None

    def halve_transformer_block(self, name: str, kept: Kept) -> None:
        """Halve the heads of both attentions, and the channels of the feed-forward."""
        self._match()
        for part, given in (("attn1", kept.self_heads), ("attn2", kept.cross_heads)):
            attention = self._attentions.get(f"{name}.{part}")
            if attention is None:
                raise _foreign(f"{name}.{part}")
            heads = _indices(given, half(attention.heads))
            narrow_heads(self._graph, attention, heads)
        mlp = self._mlps.get(f"{name}.ff.net.0.proj")
        if mlp is None:
            raise _foreign(f"{name}.ff")
        channels = _indices(kept.channels, min(mlp.hidden, half_channels(mlp.hidden)))
        narrow_channels(self._graph, mlp, channels)

    def _match(self) -> None:
        """Match all attentions and feed-forwards once, before any of them is narrower."""
        if not self._attentions:
            self._attentions = {found.name: found for found in attentions(self._graph)}
            self._mlps = {found.name: found for found in mlps(self._graph)}

    def _layer(self, name: str) -> GraphLayer:
        if not self._layers:
            self._layers = {module(layer.name): layer for layer in layers(self._graph)}
        if name not in self._layers:
            raise _foreign(name)
        return self._layers[name]

    def _groups(self, norm: str) -> int:
        """Return the groups of a norm, from the Reshape that splits them: (0, groups, -1)."""
        shape = constant(self._own(norm)[0].inputs[1])
        if shape is None or shape.shape != (3,):
            raise _foreign(norm)
        return int(shape[1])

    def _hidden(self, resnet: str) -> ir.Value:
        """Return the hidden state that enters a resnet: in an up block, without the skip."""
        value = self._entering(f"{resnet}.norm1")
        node = value.producer()
        if resnet.startswith("up_blocks.") and node is not None and node.op_type == "Concat":
            assert node.inputs[0] is not None
            return node.inputs[0]
        return value

    def _entering(self, name: str) -> ir.Value:
        value = self._own(name)[0].inputs[0]
        assert value is not None
        return value

    def _last(self, name: str) -> ir.Value:
        return self._own(name)[-1].outputs[0]

    def _own(self, name: str) -> list[ir.Node]:
        """Return the nodes of a module itself, without those of modules in it."""
        if name not in self._nodes:
            raise _foreign(name)
        return self._nodes[name]

    def _within(self, name: str) -> list[ir.Node]:
        """Return the nodes of a module and of those in it."""
        nodes = [node for node in self._graph if name in _enclosing(str(node.name))]
        layered = [node for node in nodes if node.op_type in ("Conv", "Pad", "Resize")]
        if not layered:
            raise _foreign(name)
        return layered

    def _bypass(self, entering: ir.Value | None, leaving: ir.Value) -> None:
        assert entering is not None
        leaving.replace_all_uses_with(entering)


def _foreign(name: str) -> ManifestError:
    return ManifestError(
        f"the denoiser's graph has no {name}, as diffusers names it: export the checkpoint with "
        "this version of latentforge"
    )


def _indices(kept: Sequence[int], count: int) -> Indices:
    """Return the indices to keep, the first ones if none are given."""
    return np.array(kept or range(count), np.int64)


def _spread(groups: Indices, size: int) -> Indices:
    """Return the channels of groups of a size."""
    return (groups[:, None] * size + np.arange(size)).reshape(-1)


def _between(sources: Sequence[ir.Value], end: ir.Node) -> list[ir.Node]:
    """Return the nodes that compute with the sources, in front of an end."""
    found: dict[ir.Node, None] = {}
    pending = list(sources)
    while pending:
        for node in pending.pop().consumers():
            if node is not end and node not in found:
                found[node] = None
                pending += node.outputs
    return list(found)


def _narrow_node(graph: ir.Graph, node: ir.Node, kept: Mapping[int, Indices]) -> None:
    """Keep a subset of the channels, or groups, of a node's constants; its outputs' shapes end.

    Args:
        graph: the graph.
        node: between the convolutions of a resnet.
        kept: indices to keep, by number of channels or groups.
    """
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if array is None:
            continue
        if node.op_type == "Reshape":
            sizes = [len(kept[size]) if size in kept else size for size in array.tolist()]
            replace(graph, node, index, np.array(sizes, np.int64))
        elif array.ndim and array.shape[0] in kept:
            take(graph, node, index, kept[array.shape[0]], 0)
    for output in node.outputs:
        output.shape = None
