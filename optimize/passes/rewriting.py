"""What several passes need: reading sizes off a graph, and putting named nodes into it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import constant
from latentforge.runtime.kernels import DOMAIN

__all__ = [
    "MICROSOFT",
    "TO_NCHW",
    "TO_NHWC",
    "Array",
    "Editor",
    "Dim",
    "apply_named",
    "input_at",
    "is_native",
    "lazy_tensor",
    "producer_of",
    "sole_consumer",
    "replace_native",
    "scalar",
    "dim",
    "dim_values",
    "split_scalar",
    "remove_unused",
    "absorb_add",
    "is_channel_vector",
]

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
"""Permutations between (batch, channels, height, width) and channels last."""

Array = NDArray[Any]

Dim = int | str | tuple[ir.Value, int]
"""One dimension: a number, a name, or a place in a tensor (of whose shape nothing is known)."""

_FEW = 8
"""A tensor of sizes has at most so many elements; larger constants are not looked into."""


def producer_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes a value, if it is one of these operators of ONNX."""
    node = value.producer() if value is not None else None
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in op_types:
        return None
    return node


def is_native(node: ir.Node | None, op_type: str) -> bool:
    """Whether a node is this operator of latentforge's own."""
    return node is not None and (node.domain, node.op_type) == (DOMAIN, op_type)


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None where it is missing or the node has fewer."""
    return node.inputs[index] if index < len(node.inputs) else None


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that uses a value, or None if there are more or the graph returns it."""
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if value is None or tensor is None or tensor.size != 1:
        return None
    array = constant(value)
    return None if array is None else float(array.reshape(-1)[0])


def split_scalar(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Of Mul(x, number) in any order or Div(x, number): x, and what it is multiplied by."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        return None
    if (number := scalar(second)) is not None:
        return first, (1 / number if node.op_type == "Div" else number)
    if node.op_type == "Mul" and (number := scalar(first)) is not None:
        return second, number
    return None


def is_channel_vector(value: ir.Value | None, channels: int, trailing: int) -> bool:
    """Whether a value is a constant of one number a channel, with so many axes behind it."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if value is None or tensor is None or value.is_graph_input():
        return False
    shape = list(tensor.shape.numpy())
    wanted = [channels] + [1] * trailing
    return shape == wanted or shape == [1, *wanted]


def dim(value: ir.Value, axis: int) -> Dim:
    """One dimension of a value. A name stands for the same number all over a graph."""
    if value.shape is not None:
        axis %= len(value.shape)
        dim = value.shape[axis]
        if isinstance(dim, int):
            return dim
        if dim.value is not None:
            return str(dim.value)
    return (value, axis)


def dim_values(value: ir.Value | None) -> list[Dim] | None:
    """What is known of the elements of a tensor that holds sizes, or None if it isn't a list."""
    if value is None:
        return None
    if (tensor := ir.convenience.get_const_tensor(value)) is not None:
        array = constant(value) if tensor.size <= _FEW and len(tensor.shape) <= 1 else None
        whole = array is not None and array.dtype.kind == "i"
        return list(array.reshape(-1).tolist()) if whole and array is not None else None
    node = value.producer()
    computed = _COMPUTED.get(node.op_type) if node is not None and node.domain == "" else None
    found = computed(node) if computed is not None and node is not None else None
    return found if found is not None else _opaque(value)


def _opaque(value: ir.Value) -> list[Dim] | None:
    if value.shape is None or len(value.shape) > 1:
        return None
    length = value.shape[0] if len(value.shape) else 1
    return [(value, place) for place in range(length)] if isinstance(length, int) else None


def _shape(node: ir.Node) -> list[Dim] | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    axes = range(len(value.shape))
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(axes))
    return [dim(value, axis) for axis in axes[start:end]]


def _concat(node: ir.Node) -> list[Dim] | None:
    parts = [dim_values(value) for value in node.inputs]
    return None if None in parts else [item for part in parts if part for item in part]


def _slice(node: ir.Node) -> list[Dim] | None:
    given = dim_values(node.inputs[0])
    numbers = [scalar(value) for value in node.inputs[1:]]
    if given is None or None in numbers or numbers[2:] not in ([], [0], [0, 1]):
        return None
    start, end = (int(number or 0) for number in numbers[:2])
    return given[start:end]


def _gather(node: ir.Node) -> list[Dim] | None:
    given, places = dim_values(node.inputs[0]), dim_values(node.inputs[1])
    if given is None or places is None or node.attributes.get_int("axis", 0) != 0:
        return None
    numbers = [place for place in places if isinstance(place, int)]
    known = len(numbers) == len(places)
    return [given[number] for number in numbers] if known else None


def _same(node: ir.Node) -> list[Dim] | None:
    value = node.inputs[0]
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) != ir.DataType.INT64:
        return None
    return dim_values(value)


_COMPUTED: Mapping[str, Callable[[ir.Node], list[Dim] | None]] = {
    "Shape": _shape,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "Identity": _same,
    "Cast": _same,
    "Squeeze": _same,
    "Unsqueeze": _same,
    "Reshape": _same,
}


class Editor:
    """Puts nodes into a graph, called and typed after those that they replace."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._names = {node.name for node in graph} | {
            output.name for node in graph for output in node.outputs
        }
        self._names |= set(graph.initializers) | {value.name for value in graph.inputs}

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        before: ir.Node,
        scope: str | None = None,
        domain: str = "",
        shape: Iterable[Any] | None = None,
        outputs: int = 1,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """Insert a node before another, in that one's module unless told a scope.

        Returns:
            Its first output: of that shape, and of the first input's dtype.
        """
        module = scope_of(before) if scope is None else scope
        name = self.unique_name(f"{module}/{op_type}".lstrip("/"))
        known = [
            ir.convenience.convert_attribute(key, item) for key, item in (attributes or {}).items()
        ]
        node = ir.Node(domain, op_type, inputs, known, num_outputs=outputs, name=name)
        output = node.outputs[0]
        output.name = self.unique_name(f"{name}_output")
        output.type = next((value.type for value in inputs if value is not None), None)
        output.shape = None if shape is None else ir.Shape(shape)
        if domain:
            self._graph.opset_imports.setdefault(domain, 1)
        self._graph.insert_before(before, node)
        return output

    def add_transpose(
        self, value: ir.Value, perm: Sequence[int], *, before: ir.Node, scope: str | None = None
    ) -> ir.Value:
        """Insert a Transpose, named like any node that is added."""
        shape = None if value.shape is None else [value.shape[axis] for axis in perm]
        attributes = {"perm": list(perm)}
        return self.add(
            "Transpose", [value], before=before, scope=scope, shape=shape, attributes=attributes
        )

    def add_initializer(self, name: str, tensor: Array | ir.TensorProtocol) -> ir.Value:
        """Add a constant under this name, or this name with a number."""
        tensor = ir.tensor(tensor) if isinstance(tensor, np.ndarray) else tensor
        value = ir.Value(name=self.unique_name(name), const_value=tensor)
        value.dtype = tensor.dtype
        value.shape = ir.Shape(tensor.shape.numpy())
        self._graph.register_initializer(value)
        return value

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let a value take over the name, type, shape and users of another."""
        new.name, new.type = old.name, old.type
        new.shape = old.shape if old.shape is not None else new.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def move(self, node: ir.Node, *, before: ir.Node) -> None:
        """Put a node that is there already right before another."""
        self._graph.remove(node)
        self._graph.insert_before(before, node)

    def remove(self, node: ir.Node) -> None:
        """Remove a node that nothing uses any more: it is no user of its inputs from now on."""
        self._graph.remove(node, safe=True)

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Set an input, with missing ones before it."""
        node.resize_inputs(max(index + 1, len(node.inputs)))
        node.replace_input_with(index, value)

    def unique_name(self, name: str) -> str:
        """This name, numbered if it is taken."""
        number, found = 1, name
        while found in self._names:
            number += 1
            found = f"{name}_{number}"
        self._names.add(found)
        return found


def scope_of(node: ir.Node) -> str:
    """The module that a node is named by."""
    return str(node.name or "").rpartition("/")[0]


def lazy_tensor(
    compute: Callable[..., Array], values: Sequence[ir.Value], shape: Sequence[int]
) -> ir.LazyTensor:
    """What is computed from some constants, each time anew: gigabytes of weights stay on disk."""
    tensors = [ir.convenience.get_const_tensor(value) for value in values]

    def tensor() -> ir.TensorProtocol:
        arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
        return ir.Tensor(np.ascontiguousarray(compute(*arrays).reshape(shape)))

    dtype = values[0].dtype
    assert dtype is not None
    return ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape))


def apply_named(apply: Callable[[ir.Model], Any], model: ir.Model) -> int:
    """Apply rules of a library that don't name what they make, and name it.

    A node is called after the module of the one that made the same value before.

    Returns:
        What applying gave.
    """
    known = set(model.graph)
    makers = {output.name: node for node in model.graph for output in node.outputs}
    count = apply(model)
    editor = Editor(model.graph)
    for node in model.graph:
        if node not in known:
            maker = next((makers[out.name] for out in node.outputs if out.name in makers), node)
            module = "" if maker is node else scope_of(maker)
            alike = maker is not node and maker.op_type == node.op_type
            name = f"{module}/{node.op_type}".lstrip("/")
            node.name = maker.name if alike else editor.unique_name(name)
            node.metadata_props.clear()
    return int(count)


Place = Callable[[ir.Node, ir.Value], tuple[int, ir.Value] | None]
"""Tells which input of a node a summand of its output becomes, and in which form; None if none."""


def absorb_add(editor: Editor, add: ir.Node, op_type: str, place: Place) -> bool:
    """Let an operator of latentforge's own add what an Add adds to its output."""
    first, second = add.inputs
    for value, added in ((first, second), (second, first)):
        node = value.producer() if value is not None and sole_consumer(value) is add else None
        if node is None or value is None or added is None or not is_native(node, op_type):
            continue
        if (found := place(node, added)) is not None:
            editor.set_input(node, *found)
            editor.move(node, before=add)
            editor.replace(add.outputs[0], value)
            editor.remove(add)
            return True
    return False


def remove_unused(model: ir.Model) -> None:
    """Remove what nothing uses any more."""
    common.RemoveUnusedNodesPass()(model)


def replace_native(
    editor: Editor,
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int | float],
) -> None:
    output = node.outputs[0]
    result = editor.add(
        op_type, inputs, before=node, domain=DOMAIN, shape=output.shape, attributes=attributes
    )
    made = result.producer()
    assert made is not None
    node.name, made.name = made.name, node.name
    editor.replace(output, result)
