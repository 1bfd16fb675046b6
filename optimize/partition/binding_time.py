"""Binding-time analysis: when each value of the denoiser's graph becomes available.

The term is that of partial evaluation. Here a value is bound when the graph is built (a constant),
once per prompt, once per schedule, or in every denoising step; a node is bound when the last of
its inputs is:

    weights ──────────────────────────────── CONSTANT
    encoder_hidden_states ── MatMul(to_k) ── PROMPT ──┐
    timestep ── Sin ── MatMul(time_emb) ──── TIME ────┤
    sample ── Conv ─────────────────────────────────── Add ── STEP

A node bound to the schedule may run once for all timesteps, with one row per timestep, if it
treats its rows independently (see rows.py). Otherwise it is demoted to STEP. Exported graphs repeat
the timestep for each row of the sample right at the input. Since the number of rows of the sample
is unknown outside the step, the analysis pushes that Expand down the graph as it goes:

    before                                       after (one row per timestep until the last Add)

    timestep (1,)    sample (b, 4, h, w)         timestep (rows,)     sample (b, 4, h, w)
        │               │                            │                   │
      Expand ◄── Shape ─┤                           Sin                  │
        │ (b,)          │                            │ (rows, 4)         │
       Sin              │                        Unsqueeze               │
        │ (b, 4)        │                            │ (rows, 4, 1, 1)   │
    Unsqueeze           │                            └─────── Add ───────┘
        │ (b, 4, 1, 1)  │                                      │
        └───── Add ─────┘                         Add broadcasts one row to b rows, so no Expand is
                │                                 left. Operators that do not broadcast get an
                                                  Expand of their own in the step part.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import operands, set_weight
from latentforge.optimize.partition.rows import BROADCASTING, Operand, Rows, is_row_wise
from latentforge.optimize.shape_inference import Shape

__all__ = ["BindingTime", "BindingTimeAnalysis", "Size", "axis_size", "int64_constant"]

_TRANSFERABLE_TYPES = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.INT8,
    ir.DataType.UINT8,
)
_RESHAPING = ("Expand", "Reshape")  # their second input is the shape of the output


class BindingTime(IntEnum):
    """Time at which a value becomes available; a node takes the latest of its inputs."""

    CONSTANT = 0  # when the graph is built
    PROMPT = 1  # once per prompt
    TIME = 2  # once per schedule, with one row per timestep
    STEP = 3  # in every denoising step


Size = int | tuple[ir.Value, int]
"""A fixed size, or a graph input and one of its axes."""


class BindingTimeAnalysis:
    """Binding times of a graph's values; the analysis also pushes the timestep's Expand down.

    Attributes:
        graph: the graph, which run() edits.
        binding_times: binding time of each value that is no constant.
        rows: for each value bound to the schedule, the meaning of its first dimension.
    """

    def __init__(
        self,
        graph: ir.Graph,
        shapes: Mapping[str, Shape],
        step_inputs: Sequence[str],
        time_inputs: Sequence[str],
    ) -> None:
        self.graph = graph
        self.binding_times: dict[ir.Value, BindingTime] = {}
        self.rows: dict[ir.Value, Rows] = {}
        self._shapes = dict(shapes)
        self._restored_values: dict[ir.Value, ir.Value] = {}
        self._sample = next(value for value in graph.inputs if value.name == step_inputs[0])
        self._batch = shapes[step_inputs[0]][0]
        for value in graph.inputs:
            self.binding_times[value] = _input_time(str(value.name), step_inputs, time_inputs)
            if self.binding_times[value] is BindingTime.TIME:
                self.rows[value] = Rows.ONE if self.shape(value) else Rows.SCALAR
                value.shape = ir.Shape([1])

    def binding_time(self, value: ir.Value) -> BindingTime:
        """Return the time at which a value becomes available."""
        return self.binding_times.get(value, BindingTime.CONSTANT)

    def shape(self, value: ir.Value) -> Shape | None:
        """Return the shape of a value in the original graph, None if its rank is unknown."""
        if value.const_value is not None:
            return tuple(value.const_value.shape.numpy())
        return self._shapes.get(str(value.name))

    def can_cross(self, value: ir.Value) -> bool:
        """Return True if one partition can pass this value to another, row by row."""
        shape = self.shape(value)
        if not shape or None in shape[1:] or value.dtype not in _TRANSFERABLE_TYPES:
            return False
        return self.binding_time(value) is BindingTime.TIME or shape[0] == self._batch

    def sizes(self, node: ir.Node, time: BindingTime) -> list[Size] | None:
        """Express the output of a Shape node by fixed sizes and axes of graph inputs.

        Args:
            node: a Shape node.
            time: binding time of the graph inputs that may be used.

        Returns:
            One entry per element of the node's output; None if an element cannot be expressed.
        """
        value = node.inputs[0]
        dims = None if value is None else self.shape(value)
        axes = {
            size: (source, axis)
            for source in reversed(self.graph.inputs)
            if self.binding_time(source) is time
            for axis, size in enumerate(self.shape(source) or ())
        }
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        measured = (dims or (None,))[start:end]
        sizes = [size if isinstance(size, int) else axes.get(size) for size in measured]
        available = [size for size in sizes if size is not None]
        return available if len(available) == len(sizes) else None

    def run(self) -> None:
        """Determine the binding time of every value, and move the repetition of the timestep."""
        for node in list(self.graph):
            time = self._time_of(node)
            rows = self._rows_of(node) if time is BindingTime.TIME else None
            if rows is not None:
                node = self._vectorized(node, rows)
                self.rows.update(dict.fromkeys(node.outputs, rows))
            elif time >= BindingTime.TIME:
                time = BindingTime.STEP
                self._restore_rows(node)
            self.binding_times.update(dict.fromkeys(node.outputs, time))

    def _time_of(self, node: ir.Node) -> BindingTime:
        """Return the binding time of a node: the latest of its inputs, with three exceptions."""
        if any(value.is_graph_output() for value in node.outputs):
            return BindingTime.STEP
        if (node.domain, node.op_type) == ("", "Shape"):
            return self._time_of_shape(node)
        inputs = [value for value in operands(node) if value is not None]
        if node.op_type in _RESHAPING and self.binding_time(inputs[0]) is BindingTime.TIME:
            return BindingTime.TIME  # whenever the target shape is bound: it is replaced
        return max(map(self.binding_time, inputs), default=BindingTime.CONSTANT)

    def _time_of_shape(self, node: ir.Node) -> BindingTime:
        """Return PROMPT for a size of the sample if an input bound to the prompt has it too."""
        value = node.inputs[0]
        assert value is not None
        if self.binding_time(value) <= BindingTime.PROMPT:
            return self.binding_time(value)
        measurable = self.sizes(node, BindingTime.PROMPT) is not None
        return BindingTime.PROMPT if measurable else BindingTime.STEP

    def _rows_of(self, node: ir.Node) -> Rows | None:
        """Return the meaning of a node's rows if it can run once for all timesteps, else None."""
        inputs = node.inputs[:1] if node.op_type in _RESHAPING else node.inputs
        row_operands = [None if value is None else self._operand(value) for value in inputs]
        pairs = zip(inputs, row_operands, strict=True)
        shapes = [self.shape(value) for value in node.outputs]
        if any(value is not None and operand is None for value, operand in pairs):
            return None
        if any(shape is None or None in shape for shape in shapes):
            return None
        output = shapes[0] or ()
        if not is_row_wise(node, row_operands, output):
            return None
        present = [operand for operand in row_operands if operand is not None]
        rows = max(operand.rows or Rows.SCALAR for operand in present)
        if node.op_type == "Expand" and output[:1] not in ((1,), present[0].shape[:1]):
            repeats = output[0] == self._batch and rows < Rows.REPEATED
            return Rows.REPEATED if repeats else None
        return max(rows, Rows.ONE) if output else rows

    def _operand(self, value: ir.Value) -> Operand | None:
        """Return an input of a node as the row rules see it; None if it has to stay in the step."""
        shape = self.shape(value)
        if shape is None:
            return None
        if self.binding_time(value) is BindingTime.PROMPT:
            return Operand(shape, Rows.DISTINCT) if self.can_cross(value) else None
        return Operand(shape, self.rows.get(value))

    def _vectorized(self, node: ir.Node, rows: Rows) -> ir.Node:
        """Make a node accept any number of rows, and return it or its replacement."""
        output = node.outputs[0]
        shape = self.shape(output) or ()
        if node.op_type == "Reshape":
            set_weight(self.graph, node, 1, np.array([-1, *shape[1:]]), f"{output.name}_shape")
        elif self._only_adds_rows(node):
            node = self._replaced_by_identity(node)
        for value in node.outputs:
            first = self._batch if rows is Rows.DISTINCT else 1
            value.shape = ir.Shape([first, *(self.shape(value) or ())[1:]])
        return node

    def _only_adds_rows(self, node: ir.Node) -> bool:
        """Return True for a node that is redundant once values have one row per timestep."""
        value = node.inputs[0]
        scalar = value is not None and self.rows.get(value) is Rows.SCALAR
        return node.op_type == "Expand" or (node.op_type == "Unsqueeze" and scalar)

    def _replaced_by_identity(self, node: ir.Node) -> ir.Node:
        """Replace a node by an Identity of its first input."""
        old = node.outputs[0]
        new = ir.Node("", "Identity", [node.inputs[0]], name=node.name)
        self.graph.insert_after(node, new)
        old.replace_all_uses_with(new.outputs[0])
        self.graph.remove(node, safe=True)
        new.outputs[0].name, new.outputs[0].type = old.name, old.type
        return new

    def _restore_rows(self, node: ir.Node) -> None:
        """Give a node of the step part inputs with their original rows, unless it broadcasts."""
        broadcast = {index for index in range(len(node.inputs)) if self._broadcasts(node, index)}
        for user in (node, *_inner_nodes(node)):
            for index, value in enumerate(user.inputs):
                if value in self.rows and not (user is node and index in broadcast):
                    user.replace_input_with(index, self._restored(value, node))

    def _broadcasts(self, node: ir.Node, index: int) -> bool:
        """Return True if a node repeats the rows of an input since another one has the batch."""
        value = node.inputs[index]
        if node.op_type not in BROADCASTING or value is None:
            return False
        rank = len(self.shape(value) or ())
        step_shapes = [
            self.shape(operand) or ()
            for operand in node.inputs
            if operand is not None and operand not in self.rows
        ]
        return any(len(s) >= rank > 0 and s[len(s) - rank] == self._batch for s in step_shapes)

    def _restored(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Return a value bound to the schedule in the shape that it had in the original graph."""
        rows = self.rows[value]
        if rows in (Rows.ONE, Rows.DISTINCT):
            return value
        if value not in self._restored_values:
            nodes = self._squeeze(value) if rows is Rows.SCALAR else self._expand(value)
            self.graph.insert_before(before, nodes)
            restored = nodes[-1].outputs[0]
            restored.type = value.type
            self._restored_values[value] = restored
            self._shapes[str(restored.name)] = self.shape(value) or ()
            self.binding_times.update((node.outputs[0], BindingTime.STEP) for node in nodes)
        return self._restored_values[value]

    def _squeeze(self, value: ir.Value) -> list[ir.Node]:
        return [ir.node("Squeeze", [value], name=f"{value.name}/Squeeze")]

    def _expand(self, value: ir.Value) -> list[ir.Node]:
        """Build an Expand to the rows of the sample, and the nodes that compute its shape."""
        name = f"{value.name}/Expand"
        ones = [
            int64_constant(self.graph, 1, f"{name}/one_{axis}")
            for axis in range(1, len(self.shape(value) or ()))
        ]
        rows = axis_size(self.graph, self._sample, 0, f"{name}/batch")
        shape = ir.node("Concat", [rows[-1].outputs[0], *ones], {"axis": 0}, name=f"{name}/Concat")
        return [*rows, shape, ir.node("Expand", [value, shape.outputs[0]], name=name)]


def _input_time(name: str, step_inputs: Sequence[str], time_inputs: Sequence[str]) -> BindingTime:
    """Return the binding time of a graph input; inputs in neither list belong to the prompt."""
    if name in step_inputs:
        return BindingTime.STEP
    return BindingTime.TIME if name in time_inputs else BindingTime.PROMPT


def axis_size(graph: ir.Graph, value: ir.Value, axis: int, name: str) -> list[ir.Node]:
    """Build nodes that compute the size of an axis; the last one returns it as shape (1,)."""
    shape = ir.node("Shape", [value], name=f"{name}/Shape")
    index = int64_constant(graph, axis, f"{name}/axis")
    return [shape, ir.node("Gather", [shape.outputs[0], index], {"axis": 0}, name=name)]


def int64_constant(graph: ir.Graph, number: int, name: str) -> ir.Value:
    """Add an int64 initializer of shape (1,)."""
    tensor = ir.tensor(np.array([number], np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), const_value=tensor)
    value.dtype = ir.DataType.INT64
    graph.register_initializer(value)
    return value


def _inner_nodes(node: ir.Node) -> Iterable[ir.Node]:
    """Iterate over the nodes of the subgraphs of a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
