"""Put nodes and constants into a graph, and run a graph that no file holds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.runtime.errors import BackendError, SettingsError

__all__ = [
    "add_constant",
    "add_node",
    "add_twin",
    "check_float",
    "free_name",
    "is_quantized",
    "module",
    "open_session",
    "replace",
    "tidy",
]

Array = NDArray[Any]

_HANDED_OVER = 1024  # bytes from which a constant is lent to ONNX Runtime instead of copied
_LOG_NOTHING = 4
_INTEGER_OPS = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")


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


def module(name: str) -> str:
    """The module that a node's name begins with: ``a.b/MatMul_2`` is of ``a.b``."""
    return name.rpartition("/")[0] or name


def free_name(graph: ir.Graph, name: str) -> str:
    """The name, with a number where there is an initializer of that name."""
    count, free = 1, name
    while free in graph.initializers:
        count += 1
        free = f"{name}.{count}"
    return free


def replace(old: ir.Value, new: ir.Value) -> None:
    """Put a value in the place of another, whose node goes; an output keeps its name."""
    node = old.producer()
    assert node is not None and isinstance(node.graph, ir.Graph)
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}.replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def add_twin(node: ir.Node, inputs: Sequence[ir.Value | None], name: str | None = None) -> ir.Value:
    """Put a node of the same kind, with other inputs, before a node; its output is returned."""
    twin = ir.Node(node.domain, node.op_type, inputs, [*node.attributes.values()])
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, twin)
    twin.name, old, new = name or node.name, node.outputs[0], twin.outputs[0]
    new.type, new.shape = old.type, old.shape
    return new


def add_constant(graph: ir.Graph, array: Array, name: str) -> ir.Value:
    """A new initializer; its name gets a number where there is one of that name."""
    unique = free_name(graph, name)
    tensor = ir.tensor(np.ascontiguousarray(array), name=unique)
    value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(array.shape))
    value.dtype = tensor.dtype
    graph.register_initializer(value)
    return value


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
    copy = model.clone()
    tidy(copy)  # ONNX Runtime takes no constant that nothing uses
    arrays = _lend(copy.graph)
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    try:
        content = ir.to_proto(copy).SerializeToString()
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no base class of their own
        raise BackendError(
            f"onnxruntime refuses the graph: {' '.join(str(error).split())}"
        ) from error


def _lend(graph: ir.Graph) -> Mapping[str, Array]:
    """Take the large constants out of a graph, and return them by name."""
    arrays: dict[str, Array] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if isinstance(tensor, ir.ExternalTensor) or tensor.nbytes >= _HANDED_OVER:
            array = arrays[name] = np.ascontiguousarray(tensor.numpy())
            shape = ir.Shape(array.shape)
            value.const_value = ir.ExternalTensor(
                "lent", 0, array.nbytes, tensor.dtype, shape=shape, name=name
            )
    return arrays
