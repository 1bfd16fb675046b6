"""What passes ask of a graph: constants, layers with weights, and what depends on which input."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

__all__ = ["Layer", "constant", "dependencies", "layers", "operands", "save"]
__all__ += ["session", "set_weight"]

Array = NDArray[np.generic]

_EXTERNAL = 256_000_000  # bytes of weights, as in exported engines; protobuf ends at 2 GiB
_LOG_NOTHING = 4  # each error comes to us as an exception


def constant(value: ir.Value | None) -> Array | None:
    """The array behind an initializer or a Constant node's output, or None."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def dependencies(graph: ir.Graph) -> dict[ir.Value, frozenset[str]]:
    """By value, the names of the graph's inputs that it is computed from; none for constants."""
    found = {value: frozenset([str(value.name)]) for value in graph.inputs}
    for node in graph:
        inputs = [value for value in operands(node) if value is not None]
        union = frozenset().union(*(found.get(value, frozenset()) for value in inputs))
        found.update(dict.fromkeys(node.outputs, union))
    return found


def operands(node: ir.Node) -> Iterator[ir.Value | None]:
    """The inputs of a node, and what the graphs inside it use from around them."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from inner.inputs


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A Conv, MatMul or Gemm with a constant weight.

    Attributes:
        node: it; ``node.name`` names the layer.
        out_axis: of the weight, which makes the output channels.
        in_axis: of the weight, over which a product sums.
    """

    node: ir.Node
    out_axis: int
    in_axis: int

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def input(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @cached_property
    def array(self) -> NDArray[np.float32]:
        """The weight in float32."""
        array = constant(self.weight)
        assert array is not None
        return np.asarray(array, np.float32)

    @property
    def linear(self) -> bool:
        return self.node.op_type != "Conv"


def layers(graph: ir.Graph) -> list[Layer]:
    """Every layer of a graph with a floating point weight, in the order in which they run."""
    return [layer for node in graph if (layer := _layer(node)) is not None]


def _layer(node: ir.Node) -> Layer | None:
    if node.domain != "" or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    weight = node.inputs[1]
    if not weight.is_initializer() or weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    if node.op_type == "Conv":
        return Layer(node=node, out_axis=0, in_axis=1)
    rank = len(weight.shape or ())
    if node.op_type == "MatMul" and rank == 2:
        return Layer(node=node, out_axis=1, in_axis=0)
    if node.op_type == "Gemm" and not node.attributes.get_int("transA", 0):
        transposed = node.attributes.get_int("transB", 0)
        return Layer(node=node, out_axis=1 - transposed, in_axis=transposed)
    return None


def set_weight(graph: ir.Graph, node: ir.Node, index: int, array: Array, name: str) -> ir.Value:
    """Give a node a weight of its own in place of the one at index.

    The old initializer stays for whoever else uses it; what nobody uses goes with the next
    clean-up.
    """
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    value.shape = ir.Shape(array.shape)
    graph.register_initializer(value)
    node.replace_input_with(index, value)
    return value


def save(model: ir.Model, path: Path) -> None:
    """Write a graph, its weights in NAME.data beside it where they have more than 256 MB.

    Also where they lie in a file of their own already, which the new file could not refer to.
    """
    weights = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)
    outside = any(isinstance(tensor, ir.ExternalTensor) for tensor in weights)
    external = outside or size > _EXTERNAL
    ir.save(model, path, external_data=f"{path.name}.data" if external else None)


@contextmanager
def session(model: ir.Model, folder: Path) -> Iterator[ort.InferenceSession]:
    """ONNX Runtime on the CPU with a graph as it is now, from a file that goes afterwards.

    Args:
        model: saved as it is; its weights go to a file of their own where they are large.
        folder: has room for it.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = _LOG_NOTHING
    with tempfile.TemporaryDirectory(dir=folder, prefix="graph-") as name:
        path = Path(name, "graph.onnx")
        save(model, path)
        yield ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
