"""Convert a graph's arithmetic to half precision, for CUDA and TensorRT.

The precision of every operator is written into the graph by Casts, so that the graph is strongly
typed, as TensorRT 11 requires. ONNX Runtime has a converter too (onnxruntime.transformers.float16).
It can keep operator types and named nodes in float32, but does not see what a node is computed
from, so that a time path has to be listed by name. On the demo checkpoint's UNet, with the same
operators left in float32, it inserts 154 Casts instead of 116, 45 of them of constants, in an order
that the ONNX checker rejects.

ONNX Runtime's CPU kernels compute a half graph in float32 and drop pairs of Casts, so its results
are closer to float32 than a GPU's: on the demo checkpoint's UNet the error is 0.03 to 0.2 %,
and twice that where each result is rounded, as in onnx.reference.

``compute_half`` is not for graphs whose values leave the range of half: components that the
manifest marks ``overflows``, such as the VAE of Stable Diffusion XL.
"""

from collections.abc import Sequence
from itertools import count

import onnx_ir as ir
from onnx_ir.passes import common

from latentforge.optimize.graph import module
from latentforge.optimize.half.float16 import cast_node, half_initializer
from latentforge.optimize.half.selection import AGNOSTIC, half_inputs, half_outputs, select
from latentforge.runtime.errors import SettingsError

__all__ = ["compute_half"]


def compute_half(model: ir.Model, *, keep: Sequence[str] = ()) -> int:
    """Make a graph compute in half precision where that is safe.

    In float32 stay the graph's inputs and outputs; norms and other operators in ``FLOAT``; nodes
    computed from ``TIME_INPUTS`` alone; inputs that an operator takes in float32 only, such as the
    scales of Resize; and nodes with a constant that half cannot represent (see ``fits``). Constants
    from 1e30 on stand for infinity, as in masks, and become 65504. No constant is behind a Cast: it
    is converted, or stored twice if both precisions need it.

    Softmax is in half: it subtracts the maximum, and engines fuse attention only where nothing is
    between its two products. Of quantized layers, DequantizeLinear takes its scale in half, and
    then
    returns half; QuantizeLinear takes either precision, so there is no Cast before it.

    Run it after all passes but ``store_half``, which then stores the weights that stay in float32.

    Args:
        model: with known types; not a component that is marked ``overflows``.
        keep: fnmatch patterns of the names of nodes that stay in float32.

    Returns:
        The number of nodes that compute in half now.

    Raises:
        SettingsError: the type of a value is not known and cannot be inferred.
    """
    _infer_types(model)
    graph = model.graph
    half = select(graph, keep)
    if half:
        _Converter(graph, half).convert()
    return len(half)


def _infer_types(model: ir.Model) -> None:
    """Fill in types that a rewrite left out; those of com.microsoft follow the first input."""
    remaining = -1
    while (untyped := _untyped(model.graph)) and len(untyped) != remaining:
        remaining = len(untyped)
        common.ShapeInferencePass()(model)
        for node in untyped:
            first = node.inputs[0] if node.inputs else None
            if node.domain == "com.microsoft" and first is not None and first.dtype is not None:
                for value in node.outputs:
                    value.dtype = value.dtype or first.dtype
    if untyped:
        raise SettingsError(
            f"{untyped[0].name}: the type of its output is not known, which half precision "
            "depends on; save the graph with its types, or take --precision fp32"
        )


def _untyped(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes with an output of unknown type."""
    return [node for node in graph if any(v.dtype is None for v in node.outputs)]


class _Converter:
    """Converter of a graph's nodes to half, with at most one Cast per value and direction.

    ::

        float32 ─ A (half) ─ B (half) ─ C (float32)
     ->
        float32 ─ Cast ─ A ─ B ─ Cast ─ C
    """

    def __init__(self, graph: ir.Graph, half: set[ir.Node]) -> None:
        self._graph = graph
        self._half = half
        opset = graph.opset_imports.get("", 1)
        self._inputs = {(node, index) for node in half for index in half_inputs(node, opset)}
        self._order = [node for node in graph if node in half]
        self._outputs = [v for node in self._order for v in half_outputs(node, opset)]
        self._constants: dict[ir.Value, ir.Value] = {}
        self._casts: dict[ir.Value, ir.Value] = {}
        self._names = {node.name for node in graph}

    def convert(self) -> None:
        """Convert the graph in place."""
        in_half = set(self._outputs)
        for node in self._order:
            for index, value in enumerate(node.inputs):
                if (node, index) in self._inputs and value is not None and value not in in_half:
                    node.replace_input_with(index, self._to_half(value))
        for value in self._outputs:
            value.dtype = ir.DataType.FLOAT16
            self._to_float(value)
        for node in self._order:
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        self._drop_replaced()

    def _drop_replaced(self) -> None:
        """Give a half constant the name of its float32 original, if that is unused now."""
        for old, new in self._constants.items():
            if old.is_initializer() and not old.uses():
                del self._graph.initializers[str(old.name)]
                new.name = old.name

    def _to_half(self, value: ir.Value) -> ir.Value:
        """Return a value in half: another constant, or a Cast right after its producer."""
        if (tensor := ir.convenience.get_const_tensor(value)) is not None:
            if value not in self._constants:
                self._constants[value] = half_initializer(f"{value.name}_half", tensor)
                self._graph.register_initializer(self._constants[value])
            return self._constants[value]
        if value not in self._casts:
            producer = value.producer()
            scope = str(value.name) if producer is None else module(str(producer.name))
            self._casts[value] = self._cast(value, ir.DataType.FLOAT16, scope, f"{value.name}_half")
        return self._casts[value]

    def _to_float(self, value: ir.Value) -> None:
        """Cast a value in half for its users in float32 and for the graph's outputs."""
        uses = [
            use
            for use in value.uses()
            if (use.node, use.idx) not in self._inputs and use.node.op_type not in AGNOSTIC
        ]
        if not uses and not value.is_graph_output():
            return
        name = str(value.name)
        if value.is_graph_output():
            value.name = f"{name}_half"
        scope = module(str(uses[0].node.name)) if uses else name
        output = name if value.is_graph_output() else f"{name}_float32"
        cast = self._cast(value, ir.DataType.FLOAT, scope, output)
        for use in uses:
            use.node.replace_input_with(use.idx, cast)
        for index, item in enumerate(self._graph.outputs):
            if item is value:
                self._graph.outputs[index] = cast

    def _cast(self, value: ir.Value, dtype: ir.DataType, scope: str, output: str) -> ir.Value:
        """Insert a Cast with a unique name and return its output."""
        names = (f"{scope}/Cast" + (f"_{i}" if i > 1 else "") for i in count(1))
        name = next(name for name in names if name not in self._names)
        self._names.add(name)
        node = cast_node(value, dtype, name, output)
        if (producer := value.producer()) is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return node.outputs[0]
