"""Loop-invariant code motion: cut the denoiser's graph by how often its parts have to run.

The denoising loop runs the same graph in every step with the same prompt, and in every run of a
schedule with the same timesteps. Whatever does not depend on the sample is invariant in that loop
and is hoisted out of it. Binding-time analysis (binding_time.py) decides from the names of the
inputs alone, so no part of this depends on a model family:

    before                                  after

    encoder_hidden_states ─┐                encoder_hidden_states ─► denoiser_prompt ──┐
    timestep ──────────────┼► denoiser      timestep ─► denoiser_time ─────────────────┼► denoiser
    sample ────────────────┘ (each step)    sample ────────────────────────────────────┘ (each step)

* ``denoiser_prompt`` runs once per prompt: nodes that depend on nothing but inputs which stay the
  same for a whole run, such as the keys and values of all cross-attention.
* ``denoiser_time`` runs once per schedule: nodes that depend on the timestep too and treat their
  rows independently, so that all timesteps are rows of a single run.
* ``denoiser`` runs in every step: all other nodes.

The timestep is one number, and exported graphs repeat it for every row of the sample. That Expand
is moved down to where its rows meet the sample's, and removed where the operator broadcasts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import onnx_ir as ir
from onnx_ir.passes import common

from latentforge.optimize.graph import dependencies, module, operands
from latentforge.optimize.partition.binding_time import (
    BindingTime,
    BindingTimeAnalysis,
    Size,
    axis_size,
    int64_constant,
)
from latentforge.optimize.partition.rows import Rows
from latentforge.optimize.shape_inference import Specs, shapes, specs_of
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import TensorSpec

__all__ = ["ROWS", "GraphPartition", "PartitionedGraph", "hoist"]

ROWS = "rows"
"""First dimension of the time part's tensors: timesteps, or timesteps times rows of the sample."""

_LAYERS = (
    *("Conv", "ConvInteger", "FusedConv", "NhwcConv", "Gemm", "MatMul", "MatMulInteger"),
    "MatMulNBits",
)


@dataclass(frozen=True, kw_only=True)
class GraphPartition:
    """Graph that was cut out of another one.

    Attributes:
        model: the graph, with the weights that it uses.
        inputs, outputs: its inputs and outputs as a manifest describes them.
        layers: number of its convolutions and matrix products with a constant weight.
    """

    model: ir.Model
    inputs: Specs
    outputs: Specs
    layers: int

    @classmethod
    def whole(cls, model: ir.Model, component: Component) -> "GraphPartition":
        """Return a whole graph as its only partition, as its component describes it."""
        layers = _count_layers(model.graph)
        return cls(model=model, inputs=component.inputs, outputs=component.outputs, layers=layers)


@dataclass(frozen=True, kw_only=True)
class PartitionedGraph:
    """Graph cut into partitions by binding time; an empty partition is None.

    Attributes:
        prompt: runs once per prompt, on the rows of the sample.
        time: runs once per schedule. Its inputs are the timestep and the values that it needs of
            the other inputs and of the prompt part, all of them with ROWS as first dimension.
        step: runs in every step on the sample and on the outputs of the other parts. The outputs
            of the time part have one row here, or as many as the sample.
    """

    prompt: GraphPartition | None
    time: GraphPartition | None
    step: GraphPartition

    def parts(self, name: str) -> dict[str, GraphPartition]:
        """Return the partitions by component: ``NAME_prompt``, ``NAME_time`` and ``NAME``."""
        named = {f"{name}_prompt": self.prompt, f"{name}_time": self.time, name: self.step}
        return {key: part for key, part in named.items() if part is not None}

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of layers that were moved out of the loop, for the history of a manifest."""
        parts = {"hoist-prompt": self.prompt, "hoist-time": self.time}
        return {name: part.layers for name, part in parts.items() if part is not None}


def hoist(
    model: ir.Model,
    inputs: Specs | None = None,
    outputs: Specs | None = None,
    *,
    step_inputs: Sequence[str] = ("sample",),
    time_inputs: Sequence[str] = ("timestep",),
) -> PartitionedGraph:
    """Cut a graph into the parts that run once per prompt, once per schedule and in every step.

    Rows of the sample are assumed to be independent of each other, as the runtime assumes too.

    Args:
        model: the graph, which is not changed.
        inputs, outputs: its inputs and outputs as the manifest describes them; by default they are
            read from the graph.
        step_inputs: inputs that change in every step; the first dimension of the first one is the
            batch.
        time_inputs: inputs that the schedule provides: one number for all rows, of shape [1] or
            []. Inputs in neither list stay the same for a whole run.

    Raises:
        SettingsError: the graph has no input of the first name in step_inputs.
    """
    names = [str(value.name) for value in model.graph.inputs]
    if step_inputs[0] not in names:
        raise SettingsError(
            f"cannot hoist: the graph has no input {step_inputs[0]!r}, only {', '.join(names)}; "
            "name one that changes every step"
        )
    working = model.clone()
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(working)
    specs = inputs or specs_of(working.graph.inputs)
    analysis = BindingTimeAnalysis(working.graph, shapes(working, specs), step_inputs, time_inputs)
    analysis.run()
    return _Partitioner(working, specs, outputs or specs_of(model.graph.outputs), analysis).cut()


class _Partitioner:
    """Builds one graph per binding time from the results of the analysis."""

    def __init__(
        self, model: ir.Model, inputs: Specs, outputs: Specs, analysis: BindingTimeAnalysis
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._outputs = outputs
        self._analysis = analysis
        self._names: dict[ir.Value, str] = {}
        self._order = {
            value: index for index, node in enumerate(model.graph) for value in node.outputs
        }

    def cut(self) -> PartitionedGraph:
        """Build all partitions; the live-ins of one are outputs of an earlier one."""
        time_of = self._analysis.binding_time
        step_inputs = self._live_ins(self._model.graph.outputs, BindingTime.STEP)
        times = [value for value in step_inputs if time_of(value) is BindingTime.TIME]
        time_inputs = self._live_ins(times, BindingTime.TIME)
        prompts = [v for v in {*step_inputs, *time_inputs} if time_of(v) is BindingTime.PROMPT]
        prompts.sort(key=self._order.__getitem__)
        self._names = _names([*prompts, *times], self._analysis)
        return PartitionedGraph(
            prompt=self._partition(BindingTime.PROMPT, [], prompts) if prompts else None,
            time=self._partition(BindingTime.TIME, time_inputs, times) if times else None,
            step=self._partition(BindingTime.STEP, step_inputs, []),
        )

    def _live_ins(self, outputs: Iterable[ir.Value], time: BindingTime) -> list[ir.Value]:
        """Return the values that a partition reads from earlier ones, in the graph's order.

        This is a backward liveness analysis from the partition's outputs. It ends at values that
        an earlier partition can pass on. Values that cannot cross, such as shapes and values with
        other rows than the sample, are computed again from values further up that can:

            context ─► MatMul ─► k (b, t, c)          k crosses: a live-in of the step
                                 │
                              Reshape (b*h, t, d)     cannot cross: copied into the step
                                 │
            sample ─► MatMul ─► MatMul ─► output      belongs to the step
        """
        live, live_ins = set(outputs), set()
        for node in reversed(self._model.graph):
            if live.isdisjoint(node.outputs) or self._sizes(node, time) is not None:
                continue
            for value in operands(node):
                if value is not None and self._is_live_in(value, time):
                    live_ins.add(value)
                elif value is not None:
                    live.add(value)
        return sorted(live_ins, key=self._order.__getitem__)

    def _is_live_in(self, value: ir.Value, time: BindingTime) -> bool:
        """Return True if a partition reads a value from an earlier one instead of computing it."""
        analysis, node = self._analysis, value.producer()
        earlier = BindingTime.CONSTANT < analysis.binding_time(value) < time
        if node is None or not earlier or not analysis.can_cross(value):
            return False
        if node.op_type == "DequantizeLinear" and time is BindingTime.STEP:
            # Fewer bytes, and integer kernels look for it beside the product that they replace.
            quantized = node.inputs[0]
            return quantized is None or not analysis.can_cross(quantized)
        return node.op_type != "Identity"

    def _sizes(self, node: ir.Node, time: BindingTime) -> list[Size] | None:
        """Return a partition's own source of the sizes that a Shape node measures.

        None if the node is no Shape, or the partition has the value that it measures.
        """
        value = node.inputs[0] if node.inputs else None
        if value is None or (node.domain, node.op_type) != ("", "Shape"):
            return None
        if self._analysis.binding_time(value) in (BindingTime.CONSTANT, time):
            return None
        return self._analysis.sizes(node, time)

    def _partition(
        self, time: BindingTime, live_ins: list[ir.Value], live_outs: list[ir.Value]
    ) -> GraphPartition:
        """Copy the graph, replace its inputs and outputs, and remove the nodes not needed."""
        model = self._model.clone()
        graph = model.graph
        values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
        self._replace_shape_nodes(graph, values, time)
        for value in live_ins:
            new = ir.Value(name=self._names[value], type=ir.TensorType(_dtype(value)))
            values[str(value.name)].replace_all_uses_with(new)
            graph.inputs.append(new)
        if live_outs:
            graph.outputs.clear()
            graph.outputs.extend(values[str(value.name)] for value in live_outs)
            for value, output in zip(live_outs, graph.outputs, strict=True):
                output.name = self._names[value]
        _remove_unused(model)
        return self._described(model, time)

    def _replace_shape_nodes(
        self, graph: ir.Graph, values: Mapping[str, ir.Value], time: BindingTime
    ) -> None:
        """Take sizes from the partition's own inputs if it lacks the value that Shape measures.

        before:  sample ─► Shape ─► ...        (in the prompt part, which has no sample)
        after:   encoder_hidden_states ─► Shape ─► Gather(axis) ─► Concat ─► ...
        """
        for original, node in zip(list(self._model.graph), list(graph), strict=True):
            sizes = self._sizes(original, time)
            if sizes is None:
                continue
            nodes, elements = [], []
            for index, size in enumerate(sizes):
                name = f"{node.name}/{node.outputs[0].name}_{index}"
                if isinstance(size, int):
                    elements.append(int64_constant(graph, size, name))
                else:
                    source, axis = size
                    nodes += axis_size(graph, values[str(source.name)], axis, name)
                    elements.append(nodes[-1].outputs[0])
            shape = ir.node("Concat", elements, {"axis": 0}, name=node.name)
            graph.insert_before(node, [*nodes, shape])
            node.outputs[0].replace_all_uses_with(shape.outputs[0])

    def _described(self, model: ir.Model, time: BindingTime) -> GraphPartition:
        """Return the partition, with the shapes of its inputs and outputs."""
        graph = model.graph
        crossing = {name: value for value, name in self._names.items()}
        sources = {str(value.name): value for value in self._model.graph.inputs} | crossing
        inputs = {str(v.name): self._spec(sources[str(v.name)], time) for v in graph.inputs}
        outputs = dict(self._outputs)
        if time is not BindingTime.STEP:
            outputs = {str(v.name): self._spec(crossing[str(v.name)], time) for v in graph.outputs}
        for value in (*graph.inputs, *graph.outputs):
            value.shape = ir.Shape({**inputs, **outputs}[str(value.name)].shape)
        if time is BindingTime.TIME:
            _reinfer_shapes(model)
        return GraphPartition(
            model=model, inputs=inputs, outputs=outputs, layers=_count_layers(graph)
        )

    def _spec(self, value: ir.Value, time: BindingTime) -> TensorSpec:
        """Return the manifest's description of a value at the border of a partition."""
        analysis = self._analysis
        spec = self._inputs.get(str(value.name))
        shape = spec.shape if spec is not None else analysis.shape(value) or ()
        dtype = spec.dtype if spec is not None else _dtype(value).numpy().name
        if time is BindingTime.TIME:
            shape = (ROWS, *shape[1:])
        elif analysis.rows.get(value, Rows.DISTINCT) is not Rows.DISTINCT:
            shape = (1, *shape[1:])
        return TensorSpec(dtype, tuple(size for size in shape if size is not None))


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _reinfer_shapes(model: ir.Model) -> None:
    """Infer the shapes inside the time part again, in which the original ones have one row."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def _remove_unused(model: ir.Model) -> None:
    """Remove nodes, weights and inputs that no output needs."""
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    used = [value for value in model.graph.inputs if value.uses() or value.is_graph_output()]
    model.graph.inputs.clear()
    model.graph.inputs.extend(used)


def _count_layers(graph: ir.Graph) -> int:
    sources = dependencies(graph)
    return sum(
        node.op_type in _LAYERS
        and all(not sources.get(v) for v in node.inputs[1:2] if v is not None)
        for node in graph
    )


def _names(values: Iterable[ir.Value], analysis: BindingTimeAnalysis) -> dict[ir.Value, str]:
    """Name the values that cross partitions after the module of the layer that computes them."""
    used = set(ir.convenience.create_value_mapping(analysis.graph))
    names: dict[ir.Value, str] = {}
    for value in values:
        base = _module_of(value, analysis)
        options = (base if turn == 1 else f"{base}_{turn}" for turn in count(1))
        names[value] = next(name for name in options if name not in used)
        used.add(names[value])
    return names


def _module_of(value: ir.Value, analysis: BindingTimeAnalysis) -> str:
    """Return the module of the last layer that a value passed, or that of its own node."""
    node = value.producer()
    own = node.name if node is not None else None
    while node is not None and not _is_layer(node, analysis):
        variable = [
            v for v in node.inputs if v and analysis.binding_time(v) is not BindingTime.CONSTANT
        ]
        node = variable[0].producer() if variable else None
    return module(str((node.name if node is not None else own) or value.name))


def _is_layer(node: ir.Node, analysis: BindingTimeAnalysis) -> bool:
    weights = [value for value in node.inputs[1:2] if value is not None]
    constant = all(analysis.binding_time(value) is BindingTime.CONSTANT for value in weights)
    return node.op_type in _LAYERS and constant
