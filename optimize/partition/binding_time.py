"""When each value of a graph is known: always, once a prompt, once a schedule, or every step."""

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

import numpy as np
import onnx_ir as ir

from latentforge.optimize.graph import operands, set_weight
from latentforge.optimize.partition.rows import BROADCASTING, Operand, Rows, row_wise
from latentforge.optimize.shape_inference import Shape

__all__ = ["BindingTime", "Size", "BindingTimeAnalysis", "axis_size", "number"]

_CROSSING = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.INT8,
    ir.DataType.UINT8,
)
_TO_SHAPE = ("Expand", "Reshape")  # operators of something and a shape to bring it to


class BindingTime(IntEnum):
    """When a value is known; of several inputs, the latest decides."""

    CONSTANT = 0
    PROMPT = 1
    TIME = 2
    STEP = 3


Size = int | tuple[ir.Value, int]
"""A number, or an axis of a graph's input."""


class BindingTimeAnalysis:
    """Finds out when each value is known, and pushes the timestep's repetition down.

    Attributes:
        graph: it, which is edited.
        kinds: of every value, constants apart.
        rows: of every value of the time part, what became of its first dimension.
    """

    def __init__(
        self,
        graph: ir.Graph,
        shapes: Mapping[str, Shape],
        every_step: Sequence[str],
        per_step: Sequence[str],
    ) -> None:
        self.graph = graph
        self.kinds: dict[ir.Value, BindingTime] = {}
        self.rows: dict[ir.Value, Rows] = {}
        self._shapes = dict(shapes)
        self._whole: dict[ir.Value, ir.Value] = {}
        self._sample = next(value for value in graph.inputs if value.name == every_step[0])
        self._batch = shapes[every_step[0]][0]
        for value in graph.inputs:
            step, time = value.name in every_step, value.name in per_step
            self.kinds[value] = (
                BindingTime.STEP if step else BindingTime.TIME if time else BindingTime.PROMPT
            )
            if time:
                self.rows[value] = Rows.ONE if self.shape(value) else Rows.SCALAR
                value.shape = ir.Shape([1])

    def kind(self, value: ir.Value) -> BindingTime:
        """When a value is known."""
        return self.kinds.get(value, BindingTime.CONSTANT)

    def shape(self, value: ir.Value) -> Shape | None:
        """The shape of a value as the graph came, None where not even its rank is known."""
        if value.const_value is not None:
            return tuple(value.const_value.shape.numpy())
        return self._shapes.get(str(value.name))

    def crosses(self, value: ir.Value) -> bool:
        """Whether one part can give this value to another, row by row."""
        shape = self.shape(value)
        if not shape or None in shape[1:] or value.dtype not in _CROSSING:
            return False
        return self.kind(value) is BindingTime.TIME or shape[0] == self._batch

    def sizes(self, node: ir.Node, kind: BindingTime) -> list[Size] | None:
        """What a Shape node gives, as numbers and axes of inputs of a kind, if these have it."""
        value = node.inputs[0]
        dims = None if value is None else self.shape(value)
        axes = {
            size: (source, axis)
            for source in reversed(self.graph.inputs)
            if self.kind(source) is kind
            for axis, size in enumerate(self.shape(source) or ())
        }
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        wanted = [s if isinstance(s, int) else axes.get(s) for s in (dims or (None,))[start:end]]
        known = [size for size in wanted if size is not None]
        return known if len(known) == len(wanted) else None

    def sort(self) -> None:
        """Give every value its kind."""
        for node in list(self.graph):
            kind = self._kind_of(node)
            rows = self._rows_of(node) if kind is BindingTime.TIME else None
            if rows is not None:
                node = self._stacked(node, rows)
                self.rows.update(dict.fromkeys(node.outputs, rows))
            elif kind >= BindingTime.TIME:
                kind = BindingTime.STEP
                self._restore(node)
            self.kinds.update(dict.fromkeys(node.outputs, kind))

    def _kind_of(self, node: ir.Node) -> BindingTime:
        if any(value.is_graph_output() for value in node.outputs):
            return BindingTime.STEP
        if (node.domain, node.op_type) == ("", "Shape"):
            return self._kind_of_shape(node)
        inputs = [value for value in operands(node) if value is not None]
        if node.op_type in _TO_SHAPE and self.kind(inputs[0]) is BindingTime.TIME:
            return BindingTime.TIME  # however the shape that it asks for is known
        return max(map(self.kind, inputs), default=BindingTime.CONSTANT)

    def _kind_of_shape(self, node: ir.Node) -> BindingTime:
        """A size of the sample is known as early as another input that has the same size."""
        value = node.inputs[0]
        assert value is not None
        if self.kind(value) <= BindingTime.PROMPT:
            return self.kind(value)
        return (
            BindingTime.STEP if self.sizes(node, BindingTime.PROMPT) is None else BindingTime.PROMPT
        )

    def _rows_of(self, node: ir.Node) -> Rows | None:
        """What became of the rows of a node's outputs, if it can run for all steps at once."""
        inputs = node.inputs[:1] if node.op_type in _TO_SHAPE else node.inputs
        given = [None if value is None else self._operand(value) for value in inputs]
        lost = any(v is not None and o is None for v, o in zip(inputs, given, strict=True))
        shapes = [self.shape(value) for value in node.outputs]
        if lost or any(shape is None or None in shape for shape in shapes):
            return None
        output = shapes[0] or ()
        if not row_wise(node, given, output):
            return None
        known = [operand for operand in given if operand is not None]
        rows = max(operand.rows or Rows.SCALAR for operand in known)
        if node.op_type == "Expand" and output[:1] not in ((1,), known[0].shape[:1]):
            return Rows.ALIKE if output[0] == self._batch and rows < Rows.ALIKE else None
        return max(rows, Rows.ONE) if output else rows

    def _operand(self, value: ir.Value) -> Operand | None:
        """An input of a node of the time part, if it can be one."""
        shape = self.shape(value)
        if shape is None:
            return None
        if self.kind(value) is BindingTime.PROMPT:
            return Operand(shape, Rows.OWN) if self.crosses(value) else None
        return Operand(shape, self.rows.get(value))

    def _stacked(self, node: ir.Node, rows: Rows) -> ir.Node:
        """The node as it takes any number of rows."""
        output = node.outputs[0]
        shape = self.shape(output) or ()
        if node.op_type == "Reshape":
            set_weight(self.graph, node, 1, np.array([-1, *shape[1:]]), f"{output.name}_shape")
        elif self._only_repeats(node):
            node = self._passing(node)
        for value in node.outputs:
            first = self._batch if rows is Rows.OWN else 1
            value.shape = ir.Shape([first, *(self.shape(value) or ())[1:]])
        return node

    def _only_repeats(self, node: ir.Node) -> bool:
        """Whether nothing is left for a node to do: what had no dimension has rows already."""
        value = node.inputs[0]
        number = value is not None and self.rows.get(value) is Rows.SCALAR
        return node.op_type == "Expand" or (node.op_type == "Unsqueeze" and number)

    def _passing(self, node: ir.Node) -> ir.Node:
        """A node that passes its first input on, in the place of one."""
        old = node.outputs[0]
        new = ir.Node("", "Identity", [node.inputs[0]], name=node.name)
        self.graph.insert_after(node, new)
        old.replace_all_uses_with(new.outputs[0])
        self.graph.remove(node, safe=True)
        new.outputs[0].name, new.outputs[0].type = old.name, old.type
        return new

    def _restore(self, node: ir.Node) -> None:
        """Give a node of the step part the rows that it had, where it does not broadcast."""
        absorbed = {index for index in range(len(node.inputs)) if self._absorbs(node, index)}
        for user in (node, *_inner_nodes(node)):
            for index, value in enumerate(user.inputs):
                if value in self.rows and not (user is node and index in absorbed):
                    user.replace_input_with(index, self._restored(value, node))

    def _absorbs(self, node: ir.Node, index: int) -> bool:
        """Whether a node repeats the rows of an input itself, since another input has them all."""
        value = node.inputs[index]
        if node.op_type not in BROADCASTING or value is None:
            return False
        rank = len(self.shape(value) or ())
        others = [
            self.shape(other) or ()
            for other in node.inputs
            if other is not None and other not in self.rows
        ]
        return any(len(s) >= rank > 0 and s[len(s) - rank] == self._batch for s in others)

    def _restored(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """A value of the time part in the shape that it had as the graph came."""
        if self.rows[value] in (Rows.ONE, Rows.OWN):
            return value
        if value not in self._whole:
            made = self._scalar(value) if self.rows[value] is Rows.SCALAR else self._repeated(value)
            self.graph.insert_before(before, made)
            whole = made[-1].outputs[0]
            whole.type = value.type
            self._whole[value] = whole
            self._shapes[str(whole.name)] = self.shape(value) or ()
            self.kinds.update((node.outputs[0], BindingTime.STEP) for node in made)
        return self._whole[value]

    def _scalar(self, value: ir.Value) -> list[ir.Node]:
        return [ir.node("Squeeze", [value], name=f"{value.name}/Squeeze")]

    def _repeated(self, value: ir.Value) -> list[ir.Node]:
        """An Expand to the rows of the sample."""
        name = f"{value.name}/Expand"
        ones = [
            number(self.graph, 1, f"{name}/one_{axis}")
            for axis in range(1, len(self.shape(value) or ()))
        ]
        rows = axis_size(self.graph, self._sample, 0, f"{name}/batch")
        shape = ir.node("Concat", [rows[-1].outputs[0], *ones], {"axis": 0}, name=f"{name}/Concat")
        return [*rows, shape, ir.node("Expand", [value, shape.outputs[0]], name=name)]


def axis_size(graph: ir.Graph, value: ir.Value, axis: int, name: str) -> list[ir.Node]:
    """Nodes of which the last gives the size of an axis, (1,)."""
    shape = ir.node("Shape", [value], name=f"{name}/Shape")
    index = number(graph, axis, f"{name}/axis")
    return [shape, ir.node("Gather", [shape.outputs[0], index], {"axis": 0}, name=name)]


def number(graph: ir.Graph, value: int, name: str) -> ir.Value:
    """A new initializer, (1,)."""
    tensor = ir.tensor(np.array([value], np.int64), name=name)
    made = ir.Value(name=name, shape=ir.Shape([1]), const_value=tensor)
    made.dtype = ir.DataType.INT64
    graph.register_initializer(made)
    return made


def _inner_nodes(node: ir.Node) -> Iterable[ir.Node]:
    """The nodes of the graphs inside a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
