"""Cut a graph by how often its parts have to run: once a prompt, once a schedule, every step.

A UNet is run many times with the same prompt, and in every run of a schedule with the same
timesteps. Which of its nodes follow from what is known from its inputs alone, so nothing here
knows a model: a node belongs to

* the prompt part, if it depends on nothing but inputs that stay the same for a whole run, such as
  the keys and values of all cross-attention;
* the time part, if it depends on the timestep too, and works on one row at a time: then all steps
  are rows of one run;
* the step part otherwise.

The timestep is one number, and exported graphs repeat it for every row of the sample. That Expand
is pushed down to where its rows meet the sample's, and is gone where these broadcast by themselves.
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
    number,
)
from latentforge.optimize.partition.rows import Rows
from latentforge.optimize.shape_inference import Specs, shapes, specs_of
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.manifest import Component
from latentforge.runtime.tensor import TensorSpec

__all__ = ["ROWS", "Hoisted", "GraphPartition", "hoist"]

ROWS = "rows"
"""The first dimension of the time part's tensors: steps, or steps times rows of the sample."""

_LAYERS = (
    *("Conv", "ConvInteger", "FusedConv", "NhwcConv", "Gemm", "MatMul", "MatMulInteger"),
    "MatMulNBits",
)


@dataclass(frozen=True, kw_only=True)
class GraphPartition:
    """A graph that was cut out of another.

    Attributes:
        model: it, with the weights that it uses.
        inputs, outputs: as a manifest describes them.
        layers: how many convolutions and products with a constant weight it has.
    """

    model: ir.Model
    inputs: Specs
    outputs: Specs
    layers: int

    @classmethod
    def whole(cls, model: ir.Model, component: Component) -> "GraphPartition":
        """A graph that is not cut, as its component describes it."""
        layers = _count_layers(model.graph)
        return cls(model=model, inputs=component.inputs, outputs=component.outputs, layers=layers)


@dataclass(frozen=True, kw_only=True)
class Hoisted:
    """What a graph was cut into; a part with nothing in it is None.

    Attributes:
        prompt: runs once a prompt, on the rows of the sample.
        time: runs once a schedule. Its inputs are the timestep, and what it needs of the other
            inputs and of the prompt part, all of them with ROWS as their first dimension.
        step: runs every step, and takes what the others give. What the time part gives has one
            row there, or those of the sample.
    """

    prompt: GraphPartition | None
    time: GraphPartition | None
    step: GraphPartition

    def parts(self, name: str) -> dict[str, GraphPartition]:
        """Those that are there, as components: ``NAME_prompt``, ``NAME_time`` and ``NAME``."""
        named = {f"{name}_prompt": self.prompt, f"{name}_time": self.time, name: self.step}
        return {key: part for key, part in named.items() if part is not None}

    @property
    def counts(self) -> dict[str, int]:
        """How many layers no longer run every step, for the history of a manifest."""
        parts = {"hoist-prompt": self.prompt, "hoist-time": self.time}
        return {name: part.layers for name, part in parts.items() if part is not None}


def hoist(
    model: ir.Model,
    inputs: Specs | None = None,
    outputs: Specs | None = None,
    *,
    every_step: Sequence[str] = ("sample",),
    per_step: Sequence[str] = ("timestep",),
) -> Hoisted:
    """Cut a graph into what runs once a prompt, once a schedule and every step.

    Rows of the sample are taken to be independent of each other, as the runtime takes them.

    Args:
        model: the graph, which is left as it is.
        inputs, outputs: its own as the manifest describes them; read off the graph if None.
        every_step: inputs that change every step; the first dimension of the first is the batch.
        per_step: inputs that the schedule gives: one number for all rows, of shape [1] or [].
            Inputs in neither list stay the same for a whole run.

    Raises:
        SettingsError: the graph has no such input as the first of every_step.
    """
    names = [str(value.name) for value in model.graph.inputs]
    if every_step[0] not in names:
        raise SettingsError(
            f"cannot hoist: the graph has no input {every_step[0]!r}, only {', '.join(names)}; "
            "name one that changes every step"
        )
    working = model.clone()
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(working)
    specs = inputs or specs_of(working.graph.inputs)
    sorter = BindingTimeAnalysis(working.graph, shapes(working, specs), every_step, per_step)
    sorter.sort()
    return _Cutter(working, specs, outputs or specs_of(model.graph.outputs), sorter).cut()


class _Cutter:
    """Makes graphs of what a sorter found."""

    def __init__(
        self, model: ir.Model, inputs: Specs, outputs: Specs, sorter: BindingTimeAnalysis
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._outputs = outputs
        self._sorter = sorter
        self._names: dict[ir.Value, str] = {}
        self._order = {
            value: index for index, node in enumerate(model.graph) for value in node.outputs
        }

    def cut(self) -> Hoisted:
        """All parts; what one takes, another gives."""
        step = self._taken(self._model.graph.outputs, BindingTime.STEP)
        times = [value for value in step if self._sorter.kind(value) is BindingTime.TIME]
        time = self._taken(times, BindingTime.TIME)
        prompts = [v for v in {*step, *time} if self._sorter.kind(v) is BindingTime.PROMPT]
        prompts.sort(key=self._order.__getitem__)
        self._names = _names([*prompts, *times], self._sorter)
        return Hoisted(
            prompt=self._part(BindingTime.PROMPT, [], prompts) if prompts else None,
            time=self._part(BindingTime.TIME, time, times) if times else None,
            step=self._part(BindingTime.STEP, step, []),
        )

    def _taken(self, wanted: Iterable[ir.Value], part: BindingTime) -> list[ir.Value]:
        """What a part takes from earlier ones to compute what is wanted, in order."""
        needed, taken = set(wanted), set()
        for node in reversed(self._model.graph):
            if needed.isdisjoint(node.outputs) or self._sizes(node, part) is not None:
                continue
            for value in operands(node):
                if value is not None and self._is_taken(value, part):
                    taken.add(value)
                elif value is not None:
                    needed.add(value)
        return sorted(taken, key=self._order.__getitem__)

    def _is_taken(self, value: ir.Value, part: BindingTime) -> bool:
        """Whether a part takes a value from an earlier one; else it computes it itself."""
        sorter, node = self._sorter, value.producer()
        early = BindingTime.CONSTANT < sorter.kind(value) < part
        if node is None or not early or not sorter.crosses(value):
            return False
        if node.op_type == "DequantizeLinear" and part is BindingTime.STEP:
            # Fewer bytes, and integer kernels look for it beside the product that they replace.
            quantized = node.inputs[0]
            return quantized is None or not sorter.crosses(quantized)
        return node.op_type != "Identity"

    def _sizes(self, node: ir.Node, part: BindingTime) -> list[Size] | None:
        """Where a part has the sizes that a Shape node gives, if it has not what it measures."""
        value = node.inputs[0] if node.inputs else None
        if value is None or (node.domain, node.op_type) != ("", "Shape"):
            return None
        if self._sorter.kind(value) in (BindingTime.CONSTANT, part):
            return None
        return self._sorter.sizes(node, part)

    def _part(
        self, kind: BindingTime, taken: list[ir.Value], given: list[ir.Value]
    ) -> GraphPartition:
        """A copy of the graph with other inputs and outputs, and without what these don't need."""
        model = self._model.clone()
        graph = model.graph
        values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
        self._measure(graph, values, kind)
        for value in taken:
            new = ir.Value(name=self._names[value], type=ir.TensorType(_dtype(value)))
            values[str(value.name)].replace_all_uses_with(new)
            graph.inputs.append(new)
        if given:
            graph.outputs.clear()
            graph.outputs.extend(values[str(value.name)] for value in given)
            for value, output in zip(given, graph.outputs, strict=True):
                output.name = self._names[value]
        _remove_unused(model)
        return self._described(model, kind)

    def _measure(self, graph: ir.Graph, values: Mapping[str, ir.Value], part: BindingTime) -> None:
        """Take sizes from the part's own inputs, where it has not what they were taken from."""
        for original, node in zip(list(self._model.graph), list(graph), strict=True):
            sizes = self._sizes(original, part)
            if sizes is None:
                continue
            nodes, pieces = [], []
            for index, size in enumerate(sizes):
                name = f"{node.name}/{node.outputs[0].name}_{index}"
                if isinstance(size, int):
                    pieces.append(number(graph, size, name))
                else:
                    source, axis = size
                    nodes += axis_size(graph, values[str(source.name)], axis, name)
                    pieces.append(nodes[-1].outputs[0])
            shape = ir.node("Concat", pieces, {"axis": 0}, name=node.name)
            graph.insert_before(node, [*nodes, shape])
            node.outputs[0].replace_all_uses_with(shape.outputs[0])

    def _described(self, model: ir.Model, kind: BindingTime) -> GraphPartition:
        """The part, with the shapes of its inputs and outputs."""
        graph = model.graph
        crossing = {name: value for value, name in self._names.items()}
        known = {str(value.name): value for value in self._model.graph.inputs} | crossing
        inputs = {str(v.name): self._spec(known[str(v.name)], kind) for v in graph.inputs}
        outputs = dict(self._outputs)
        if kind is not BindingTime.STEP:
            outputs = {str(v.name): self._spec(crossing[str(v.name)], kind) for v in graph.outputs}
        for value in (*graph.inputs, *graph.outputs):
            value.shape = ir.Shape({**inputs, **outputs}[str(value.name)].shape)
        if kind is BindingTime.TIME:
            _restate_shapes(model)
        return GraphPartition(
            model=model, inputs=inputs, outputs=outputs, layers=_count_layers(graph)
        )

    def _spec(self, value: ir.Value, part: BindingTime) -> TensorSpec:
        """What a manifest says of a value where a part takes or gives it."""
        sorter = self._sorter
        given = self._inputs.get(str(value.name))
        shape = given.shape if given is not None else sorter.shape(value) or ()
        dtype = given.dtype if given is not None else _dtype(value).numpy().name
        if part is BindingTime.TIME:
            shape = (ROWS, *shape[1:])
        elif sorter.rows.get(value, Rows.OWN) is not Rows.OWN:
            shape = (1, *shape[1:])
        return TensorSpec(dtype, tuple(size for size in shape if size is not None))


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _restate_shapes(model: ir.Model) -> None:
    """Infer the shapes inside the time part, which still say that there is one row."""
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
    found = dependencies(graph)
    return sum(
        node.op_type in _LAYERS and all(not found.get(v) for v in node.inputs[1:2] if v is not None)
        for node in graph
    )


def _names(values: Iterable[ir.Value], sorter: BindingTimeAnalysis) -> dict[ir.Value, str]:
    """Names for values that cross: the module of the layer that they come from."""
    taken = set(ir.convenience.create_value_mapping(sorter.graph))
    names: dict[ir.Value, str] = {}
    for value in values:
        base = _layer_of(value, sorter)
        tries = (base if turn == 1 else f"{base}_{turn}" for turn in count(1))
        names[value] = next(name for name in tries if name not in taken)
        taken.add(names[value])
    return names


def _layer_of(value: ir.Value, sorter: BindingTimeAnalysis) -> str:
    """The module of the last layer before a value, or that of its own node."""
    node = value.producer()
    own = node.name if node is not None else None
    while node is not None and not _is_layer(node, sorter):
        before = [v for v in node.inputs if v and sorter.kind(v) is not BindingTime.CONSTANT]
        node = before[0].producer() if before else None
    return module(str((node.name if node is not None else own) or value.name))


def _is_layer(node: ir.Node, sorter: BindingTimeAnalysis) -> bool:
    weights = [value for value in node.inputs[1:2] if value is not None]
    constant = all(sorter.kind(value) is BindingTime.CONSTANT for value in weights)
    return node.op_type in _LAYERS and constant
