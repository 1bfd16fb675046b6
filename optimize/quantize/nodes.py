"""Insert nodes into a graph, and detect graphs that are quantized already."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from latentforge.runtime.errors import SettingsError

__all__ = ["add_copy", "add_node", "check_float", "is_quantized", "replace"]

_INTEGER_OPS = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")


def is_quantized(model: ir.Model) -> bool:
    """Return True if any node quantizes, or computes with quantized numbers."""
    return any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear", "MatMulNBits")
        or node.op_type.startswith(("QLinear", *_INTEGER_OPS))
        for node in model.graph.all_nodes()
    )


def check_float(model: ir.Model) -> None:
    """Raise SettingsError if a graph is quantized already."""
    if is_quantized(model):
        raise SettingsError("the graph is quantized already: start from the float engines")


def replace(old: ir.Value, new: ir.Value) -> None:
    """Replace a value by another and remove its node; a graph output keeps its name."""
    node = old.producer()
    assert node is not None and isinstance(node.graph, ir.Graph)
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}.replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def add_copy(node: ir.Node, inputs: Sequence[ir.Value | None], name: str | None = None) -> ir.Value:
    """Insert a copy of a node with other inputs in front of it, and return the copy's output."""
    copy = ir.Node(node.domain, node.op_type, inputs, [*node.attributes.values()])
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, copy)
    copy.name, old, new = name or node.name, node.outputs[0], copy.outputs[0]
    new.type, new.shape = old.type, old.shape
    return new


def add_node(
    before: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    *,
    name: str,
    like: ir.Value | None = None,
    dtype: ir.DataType | None = None,
    domain: str = "",
    outputs: int = 1,
    node_name: str | None = None,
    **attributes: Any,
) -> ir.Value:
    """Insert a new node and return its first output.

    Args:
        before: node in front of which to insert it.
        operator: operator type.
        inputs: inputs of the node.
        name: name of the module that the node belongs to.
        like: value whose shape the output has, and whose dtype by default.
        dtype: dtype of the outputs.
        domain: domain of the operator.
        outputs: number of outputs.
        node_name: name of the node; by default the module's name and the operator.
        attributes: attributes of the operator.
    """
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    node = ir.node(
        operator,
        inputs,
        attributes,
        domain=domain,
        num_outputs=outputs,
        name=node_name or f"{name}/{operator}",
    )
    graph.insert_before(before, node)
    if (type_ := dtype or (None if like is None else like.dtype)) is not None:
        for value in node.outputs:
            value.dtype = type_
    node.outputs[0].shape = None if like is None else like.shape
    return node.outputs[0]
