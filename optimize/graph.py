"""Operations on any ONNX graph: find its layers, add constants, run it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.runtime.errors import BackendError
from latentforge.runtime.kernels import DOMAIN, required_library
from latentforge.runtime.text import one_line

__all__ = [
    "GraphLayer",
    "add_constant",
    "constant",
    "dependencies",
    "extract_initializers",
    "layers",
    "matches",
    "module",
    "open_session",
    "operands",
    "set_weight",
    "tidy",
]

Array = NDArray[np.generic]

_SHARED = 1024  # bytes from which ONNX Runtime uses our array of a constant instead of a copy
_FATAL = 4  # log severity: errors are raised as exceptions


def constant(value: ir.Value | None) -> Array | None:
    """Return the array of an initializer or a Constant node's output, or None for other values."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def dependencies(graph: ir.Graph) -> dict[ir.Value, frozenset[str]]:
    """Return, by value, the names of the graph inputs that it depends on; none for constants."""
    names = {value: frozenset([str(value.name)]) for value in graph.inputs}
    for node in graph:
        inputs = [value for value in operands(node) if value is not None]
        union = frozenset().union(*(names.get(value, frozenset()) for value in inputs))
        names.update(dict.fromkeys(node.outputs, union))
    return names


def operands(node: ir.Node) -> Iterator[ir.Value | None]:
    """Yield the inputs of a node, and the values that its subgraphs use."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from inner.inputs


@dataclass(frozen=True, kw_only=True)
class GraphLayer:
    """Conv, MatMul or Gemm with a constant weight.

    Attributes:
        node: the node, whose name is the layer's name.
        out_axis: axis of the weight that counts output channels.
        in_axis: axis of the weight over which the product sums.
    """

    node: ir.Node
    out_axis: int
    in_axis: int

    @property
    def name(self) -> str:
        """Name of the node."""
        return str(self.node.name)

    @property
    def input(self) -> ir.Value:
        """Activation that enters the layer."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        """Initializer of the weight."""
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """Activation that leaves the layer."""
        return self.node.outputs[0]

    @cached_property
    def array(self) -> NDArray[np.float32]:
        """Weight in float32."""
        array = constant(self.weight)
        assert array is not None
        return np.asarray(array, np.float32)

    @property
    def linear(self) -> bool:
        """True for MatMul and Gemm, False for Conv."""
        return self.node.op_type != "Conv"


def layers(graph: ir.Graph) -> list[GraphLayer]:
    """Return the layers of a graph with a floating-point weight, in execution order."""
    return [layer for node in graph if (layer := _layer(node)) is not None]


def _layer(node: ir.Node) -> GraphLayer | None:
    """Return a node as a layer, or None if it is none."""
    if node.domain != "" or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    weight = node.inputs[1]
    if not weight.is_initializer() or weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    if node.op_type == "Conv":
        return GraphLayer(node=node, out_axis=0, in_axis=1)
    rank = len(weight.shape or ())
    if node.op_type == "MatMul" and rank == 2:
        return GraphLayer(node=node, out_axis=1, in_axis=0)
    if node.op_type == "Gemm" and not node.attributes.get_int("transA", 0):
        transposed = node.attributes.get_int("transB", 0)
        return GraphLayer(node=node, out_axis=1 - transposed, in_axis=transposed)
    return None


def module(name: str) -> str:
    """Return the module that a node's name begins with: ``a.b`` for ``a.b/MatMul_2``."""
    return name.rpartition("/")[0] or name


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return True if a node's name equals a pattern or matches it by fnmatch."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def add_constant(graph: ir.Graph, array: Array, name: str) -> ir.Value:
    """Add an initializer to a graph; its name is numbered if it is in use."""
    unique = _unique_name(graph, name)
    tensor = ir.tensor(np.asarray(array, order="C"), name=unique)
    value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(array.shape))
    value.dtype = tensor.dtype
    graph.register_initializer(value)
    return value


def _unique_name(graph: ir.Graph, name: str) -> str:
    """Return a name, numbered if there is an initializer of that name."""
    count, candidate = 1, name
    while candidate in graph.initializers:
        count += 1
        candidate = f"{name}.{count}"
    return candidate


def set_weight(graph: ir.Graph, node: ir.Node, index: int, array: Array, name: str) -> ir.Value:
    """Replace the constant at an input of a node by a new one, and return that.

    The old initializer stays, since other nodes may use it; ``tidy`` removes it if none does.
    """
    value = add_constant(graph, array, name)
    node.replace_input_with(index, value)
    return value


def tidy(model: ir.Model) -> None:
    """Remove unused nodes and initializers, and number nodes of the same name."""
    common.RemoveUnusedNodesPass()(model)
    seen: Counter[str] = Counter()
    for node in model.graph:
        name = str(node.name)
        seen[name] += 1
        if seen[name] > 1:
            node.name = f"{name}_{seen[name]}"
            seen[node.name] += 1


def open_session(model: ir.Model, *, profile: str | None = None) -> ort.InferenceSession:
    """Load a model from memory into ONNX Runtime's CPU provider, without a copy of its weights.

    Args:
        model: is not changed.
        profile: prefix of the file to which the time of each node is written; None for no profile.

    Raises:
        BackendError: ONNX Runtime cannot load the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    # In the order of the file, a node that measures a tensor runs right after the tensor's
    # producer, and the tensor is freed; by default such nodes all run at the end.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if any(node.domain == DOMAIN for node in model.graph):
        options.register_custom_ops_library(str(required_library("the graph")))
    copy = model.clone()
    tidy(copy)  # ONNX Runtime rejects unused external initializers
    arrays = extract_initializers(copy.graph)
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    try:
        content = ir.to_proto(copy).SerializeToString()
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors have no common base class
        reason = one_line(error, limit=None)
        raise BackendError(f"onnxruntime cannot load the graph: {reason}") from error


def extract_initializers(graph: ir.Graph) -> dict[str, Array]:
    """Replace the large constants of a graph by references, and return their arrays by name.

    The arrays are passed to ONNX Runtime beside the graph, which would copy them otherwise.
    """
    arrays: dict[str, Array] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if isinstance(tensor, ir.ExternalTensor) or tensor.nbytes >= _SHARED:
            array = np.asarray(tensor.numpy(), order="C")
            # Small ones stay, as shapes must be in the graph; and bfloat16 and int4, which numpy
            # lacks.
            if array.nbytes < _SHARED or array.dtype.kind == "V":
                value.const_value = ir.tensor(array, name=name)
                continue
            arrays[name] = array
            shape = ir.Shape(array.shape)
            value.const_value = ir.ExternalTensor(
                "memory", 0, array.nbytes, tensor.dtype, shape=shape, name=name
            )
    return arrays
