"""Rewriting: insert, replace and remove named nodes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.passes.matching import decline, is_native, sole_consumer
from latentforge.runtime.kernels import DOMAIN

__all__ = [
    "TO_NCHW",
    "TO_NHWC",
    "Array",
    "Editor",
    "absorb_add",
    "apply_named",
    "lazy_tensor",
    "remove_unused",
    "replace_native",
    "scope_of",
]

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
"""Permutations between (batch, channels, height, width) and channels last."""

Array = NDArray[Any]


class Editor:
    """Editor of one graph: names and types new nodes after the ones that they replace."""

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
        """Insert a node.

        Args:
            op_type, domain, inputs, attributes: of the node.
            before: node before which it is inserted.
            scope: module that the node is named after; by default that of ``before``.
            shape: of the first output.
            outputs: number of outputs.

        Returns:
            The first output, with the dtype of the first input.
        """
        module = scope_of(before) if scope is None else scope
        name = self.unique_name(f"{module}/{op_type}".lstrip("/"))
        converted = [
            ir.convenience.convert_attribute(key, item) for key, item in (attributes or {}).items()
        ]
        node = ir.Node(domain, op_type, inputs, converted, num_outputs=outputs, name=name)
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
        """Insert a Transpose, named as by ``add``, and return its output."""
        shape = None if value.shape is None else [value.shape[axis] for axis in perm]
        attributes = {"perm": list(perm)}
        return self.add(
            "Transpose", [value], before=before, scope=scope, shape=shape, attributes=attributes
        )

    def add_initializer(self, name: str, tensor: Array | ir.TensorProtocol) -> ir.Value:
        """Add a constant under a name, which is numbered if it is in use."""
        tensor = ir.tensor(tensor) if isinstance(tensor, np.ndarray) else tensor
        value = ir.Value(name=self.unique_name(name), const_value=tensor)
        value.dtype = tensor.dtype
        value.shape = ir.Shape(tensor.shape.numpy())
        self._graph.register_initializer(value)
        return value

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Give a value the name, type, shape and consumers of the one that it replaces."""
        new.name, new.type = old.name, old.type
        new.shape = old.shape if old.shape is not None else new.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def move(self, node: ir.Node, *, before: ir.Node) -> None:
        """Move a node to the place right before another."""
        self._graph.remove(node)
        self._graph.insert_before(before, node)

    def remove(self, node: ir.Node) -> None:
        """Remove an unused node at once, so that it no longer counts as a consumer."""
        self._graph.remove(node, safe=True)

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Set an input of a node, which may have fewer inputs so far."""
        node.resize_inputs(max(index + 1, len(node.inputs)))
        node.replace_input_with(index, value)

    def unique_name(self, name: str) -> str:
        """Return a name, numbered if it is in use, and reserve it."""
        number, candidate = 1, name
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate


def scope_of(node: ir.Node) -> str:
    """Return the module that a node is named after: ``a.b`` for ``a.b/MatMul_2``."""
    return str(node.name or "").rpartition("/")[0]


def lazy_tensor(
    compute: Callable[..., Array], values: Sequence[ir.Value], shape: Sequence[int]
) -> ir.LazyTensor:
    """Return a tensor that is computed from constants each time it is read.

    Gigabytes of weights stay on disk until the graph is written.

    Args:
        compute: function of the constants' arrays; its result is reshaped.
        values: the constants; the first one's dtype is the result's.
        shape: of the result.
    """
    tensors = [ir.convenience.get_const_tensor(value) for value in values]

    def evaluate() -> ir.TensorProtocol:
        arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
        return ir.Tensor(np.ascontiguousarray(compute(*arrays).reshape(shape)))

    dtype = values[0].dtype
    assert dtype is not None
    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape))


def apply_named(apply: Callable[[ir.Model], Any], model: ir.Model) -> int:
    """Apply a library's rewrite rules and name the nodes that they insert without a name.

    A new node is named after the module of the node that computed the same value before.

    Returns:
        The return value of ``apply``.
    """
    old_nodes = set(model.graph)
    producers = {output.name: node for node in model.graph for output in node.outputs}
    count = apply(model)
    editor = Editor(model.graph)
    for node in model.graph:
        if node not in old_nodes:
            outputs = (out.name for out in node.outputs)
            old = next((producers[name] for name in outputs if name in producers), None)
            _name_after(editor, node, old)
    return int(count)


def _name_after(editor: Editor, node: ir.Node, old: ir.Node | None) -> None:
    """Name a node after the one that it replaces: alike if both are the same operator."""
    if old is not None and old.op_type == node.op_type:
        node.name = old.name
    else:
        module = "" if old is None else scope_of(old)
        node.name = editor.unique_name(f"{module}/{node.op_type}".lstrip("/"))
    node.metadata_props.clear()


SummandInput = Callable[[ir.Node, ir.Value], tuple[int, ir.Value] | None]
"""Function of a node and a summand of its output: the index of the input that adds the summand,
and the summand in the form which that input takes; None if the node cannot add it."""


def absorb_add(editor: Editor, add: ir.Node, op_type: str, summand_input: SummandInput) -> bool:
    """Let an operator of latentforge's library add the other summand of an Add to its output.

    ::

        Op(x, ...) ── Add ── y        Op(x, ..., summand) ── y
                       │        ->
                    summand
    """
    first, second = add.inputs
    candidate = False
    for value, summand in ((first, second), (second, first)):
        node = value.producer() if value is not None and sole_consumer(value) is add else None
        if node is None or value is None or summand is None or not is_native(node, op_type):
            continue
        candidate = True
        if (place := summand_input(node, summand)) is not None:
            editor.set_input(node, *place)
            editor.move(node, before=add)
            editor.replace(add.outputs[0], value)
            editor.remove(add)
            return True
    if candidate:
        decline(add, f"{DOMAIN}.{op_type} has no free input for a summand of this shape")
    return False


def replace_native(
    editor: Editor,
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int | float],
) -> None:
    """Replace a node with an operator of latentforge's library, under the node's name."""
    output = node.outputs[0]
    result = editor.add(
        op_type, inputs, before=node, domain=DOMAIN, shape=output.shape, attributes=attributes
    )
    native = result.producer()
    assert native is not None
    node.name, native.name = native.name, node.name
    editor.replace(output, result)


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing uses."""
    common.RemoveUnusedNodesPass()(model)
