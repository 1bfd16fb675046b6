"""Put nodes into a graph, and tell whether it has quantized ones."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from latentforge.runtime.errors import SettingsError

__all__ = ["add_node", "add_variant", "check_float", "is_quantized", "replace"]

_INTEGER_OPS = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")


def is_quantized(model: ir.Model) -> bool:
    """Whether any node quantizes, or works on quantized numbers."""
    return any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear", "MatMulNBits")
        or node.op_type.startswith(("QLinear", *_INTEGER_OPS))
        for node in model.graph.all_nodes()
    )


def check_float(model: ir.Model) -> None:
    """Raise SettingsError for a graph that is quantized already."""
    if is_quantized(model):
        raise SettingsError("the graph is quantized already: start from the float engines")


def replace(old: ir.Value, new: ir.Value) -> None:
    """Put a value in the place of another, whose node goes; an output keeps its name."""
    node = old.producer()
    assert node is not None and isinstance(node.graph, ir.Graph)
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}.replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def add_variant(
    node: ir.Node, inputs: Sequence[ir.Value | None], name: str | None = None
) -> ir.Value:
    """Put a node of the same kind, with other inputs, before a node; its output is returned."""
    twin = ir.Node(node.domain, node.op_type, inputs, [*node.attributes.values()])
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, twin)
    twin.name, old, new = name or node.name, node.outputs[0], twin.outputs[0]
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
    """Put a node before another and return its first output.

    Args:
        before: what it goes in front of.
        operator: its type.
        inputs: its inputs.
        name: of the module that it belongs to.
        like: whose shape the output has, and whose dtype if none is given.
        dtype: of the output.
        domain: of the operator.
        outputs: how many it has.
        node_name: its own, if not made of its module and its type.
        attributes: the operator's.
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
    if (kind := dtype or (None if like is None else like.dtype)) is not None:
        for value in node.outputs:
            value.dtype = kind
    node.outputs[0].shape = None if like is None else like.shape
    return node.outputs[0]
