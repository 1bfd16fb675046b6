"""What passes ask of a graph and do to any: find layers, add constants, save it and run it."""

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
from latentforge.runtime.kernels import DOMAIN, needed_library
from latentforge.runtime.text import one_line

__all__ = [
    "GraphLayer",
    "add_constant",
    "constant",
    "dependencies",
    "layers",
    "extract_initializers",
]
__all__ += ["matches", "module", "open_session", "operands", "set_weight", "tidy"]

Array = NDArray[np.generic]

_HANDED_OVER = 1024  # bytes from which a constant is lent to ONNX Runtime instead of copied
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
class GraphLayer:
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


def layers(graph: ir.Graph) -> list[GraphLayer]:
    """Every layer of a graph with a floating point weight, in the order in which they run."""
    return [layer for node in graph if (layer := _layer(node)) is not None]


def _layer(node: ir.Node) -> GraphLayer | None:
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
    """The module that a node's name begins with: ``a.b/MatMul_2`` is of ``a.b``."""
    return name.rpartition("/")[0] or name


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a node's name is one of the patterns, or fits one as fnmatch has them."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def add_constant(graph: ir.Graph, array: Array, name: str) -> ir.Value:
    """A new initializer; its name gets a number where there is one of that name."""
    unique = _free_name(graph, name)
    tensor = ir.tensor(np.asarray(array, order="C"), name=unique)
    value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(array.shape))
    value.dtype = tensor.dtype
    graph.register_initializer(value)
    return value


def _free_name(graph: ir.Graph, name: str) -> str:
    """The name, with a number where there is an initializer of that name."""
    count, free = 1, name
    while free in graph.initializers:
        count += 1
        free = f"{name}.{count}"
    return free


def set_weight(graph: ir.Graph, node: ir.Node, index: int, array: Array, name: str) -> ir.Value:
    """Give a node a new constant, as add_constant() makes it, in place of the one at index.

    The old initializer stays for whoever else uses it; what nobody uses goes with the next
    clean-up.
    """
    value = add_constant(graph, array, name)
    node.replace_input_with(index, value)
    return value


def tidy(model: ir.Model) -> None:
    """Drop what nothing uses, and number nodes of the same name."""
    common.RemoveUnusedNodesPass()(model)
    seen: Counter[str] = Counter()
    for node in model.graph:
        name = str(node.name)
        seen[name] += 1
        if seen[name] > 1:
            node.name = f"{name}_{seen[name]}"
            seen[node.name] += 1


def open_session(model: ir.Model, *, profile: str | None = None) -> ort.InferenceSession:
    """Load a model that is in memory on the CPU, without a copy of its weights.

    Args:
        model: stays as it is.
        profile: where to record what each node takes; the beginning of a file's name.

    Raises:
        BackendError: ONNX Runtime refuses it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_NOTHING
    # In the order of the file, what measures a tensor runs right after what makes it, which
    # then is freed; by default it all runs at the end.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if any(node.domain == DOMAIN for node in model.graph):
        options.register_custom_ops_library(str(needed_library("the graph")))
    copy = model.clone()
    tidy(copy)  # ONNX Runtime takes no constant that nothing uses
    arrays = extract_initializers(copy.graph)
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    try:
        content = ir.to_proto(copy).SerializeToString()
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no base class of their own
        reason = one_line(error, limit=None)
        raise BackendError(f"onnxruntime refuses the graph: {reason}") from error


def extract_initializers(graph: ir.Graph) -> dict[str, Array]:
    """Take the large constants out of a graph, and return them by name."""
    arrays: dict[str, Array] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if isinstance(tensor, ir.ExternalTensor) or tensor.nbytes >= _HANDED_OVER:
            array = np.asarray(tensor.numpy(), order="C")
            # Shapes have to be in the graph, and so have bfloat16 and int4, which numpy lacks.
            if array.nbytes < _HANDED_OVER or array.dtype.kind == "V":
                value.const_value = ir.tensor(array, name=name)
                continue
            arrays[name] = array
            shape = ir.Shape(array.shape)
            value.const_value = ir.ExternalTensor(
                "lent", 0, array.nbytes, tensor.dtype, shape=shape, name=name
            )
    return arrays
