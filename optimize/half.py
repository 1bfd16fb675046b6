"""Half precision: weights stored in float16, or weights and arithmetic in it.

``store_half`` is for targets that compute in float32. A weight becomes a float16 initializer and
one Cast, which ONNX Runtime folds when it loads the file: the file is half as large, and a run
costs what it did. Loading takes a little longer, and for its duration the memory of both copies.

``compute_half`` is for CUDA and TensorRT. It writes the precision of every operator into the graph
by Casts, so that the graph is strongly typed, which TensorRT 11 asks for. ONNX Runtime has a
converter too (onnxruntime.transformers.float16). It knows operator types and node names to leave
in float, not what a node is computed from, so that a time path has to be listed. Of the embedded
checkpoint's UNet, with the same operators left in float, it makes 154 Casts where 116 do, 45 of
them of constants, in an order that the ONNX checker refuses.

ONNX Runtime's CPU kernels compute a half graph in float32 and drop Casts there and back, so what
it gives is closer to float than what a GPU gives: the embedded checkpoint's UNet is off by 0.03 to
0.2 % on it, and by twice that where each result is rounded, as in onnx.reference.

A graph whose values leave the range of half is not for ``compute_half``: a component that the
manifest marks ``overflows_fp16``, such as the VAE of Stable Diffusion XL.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from latentforge.optimize.graph import constant, matches, module
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.kernels import DOMAIN

__all__ = ["TIME", "compute_half", "store_half"]

TIME = ("timestep", "timestep_cond", "time_ids", "text_embeds")
"""Inputs of a UNet that hold a few numbers a picture. What is computed from them alone stays in
float32: it costs next to nothing, and sine and cosine of a timestep up to 1000, which half knows to
half a unit, would be noise."""

FLOAT = {
    # Mean and variance of thousands of values: squares overflow from 256 on. LayerNormalization
    # asks for float32 statistics itself (stash_type); whether an engine keeps to that cannot be
    # tested without a GPU, so it has float32 all around.
    "InstanceNormalization",
    "LayerNormalization",
    "GroupNormalization",
    "LpNormalization",
    "MeanVarianceNormalization",
    "BatchNormalization",
    "RMSNormalization",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL2",
    "ReduceProd",
    "Pow",
    "Sqrt",
    "Reciprocal",
    # What grows beyond 65504 from small numbers, or needs more than 11 bits of its argument.
    "Exp",
    "Log",
    "Sin",
    "Cos",
    "CumSum",
    "Range",
    "ConstantOfShape",
}
"""Operators that stay in float32 wherever they are."""

CONTRIB: dict[str, frozenset[int]] = {
    "Attention": frozenset(),
    "BiasAdd": frozenset(),
    "BiasGelu": frozenset(),
    "BiasSplitGelu": frozenset(),
    "FastGelu": frozenset(),
    "FusedMatMul": frozenset(),
    "Gelu": frozenset(),
    "GroupNorm": frozenset({1, 2}),
    "MatMulNBits": frozenset(),
    "MultiHeadAttention": frozenset(),
    "NhwcConv": frozenset(),
    "QuickGelu": frozenset(),
    "SkipGroupNorm": frozenset({1, 2}),
    "SkipLayerNormalization": frozenset(),
}
"""Operators of com.microsoft with CUDA kernels for half, and their inputs that stay in float32.

The norms among them sum in float32 whatever they are given, and TensorRT does not know them.
SkipLayerNormalization does so since May 2026 (onnxruntime pull request 28682); before, it sums
x ** 2 / n in half unless the CUDA provider has enable_skip_layer_norm_strict_mode.
"""

AGNOSTIC = {"Cast", "Shape", "Size"}
"""Operators that take any precision, and give none or their own."""

MOVES = {
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "QuantizeLinear",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
"""Operators that compute nothing: between two that stay in float32 they stay too.

QuantizeLinear is one because what it gives has no precision: it takes what it is given.
"""

_SMALL = 1024  # elements: below, a Cast costs more than it saves
_LARGEST = float(np.finfo(np.float16).max)
_INFINITE = 1e30  # what is larger stands for infinity, as in masks
_LOSS = 1e-3  # of the norm: rounding alone costs at most 2 ** -11
_QUANTIZED = ("uantize", "QLinear", "Integer", "NBits")  # in the names of what takes scales

Array = NDArray[np.float16]


def store_half(model: ir.Model) -> int:
    """Store float32 weights in half, each behind one Cast to float32; return how many.

    Our own Conv and MatMul convert their weights themselves, and have no Cast.

    Stored in float32 stay: weights of less than 1024 elements, the scales of quantized layers, and
    what half cannot hold, which is a value beyond 65504, or so much of the weight below 6e-5, where
    half loses digits, that its norm changes by a thousandth.
    """
    graph = model.graph
    weights = [value for value in graph.initializers.values() if _storable(value)]
    casts = [_stored(graph, value) for value in weights]
    for cast in reversed(casts):
        if cast is not None:
            graph.insert_before(graph[0], cast)
    return len(casts)


def _storable(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or value.dtype != ir.DataType.FLOAT or tensor.size < _SMALL:
        return False
    if value.is_graph_input() or value.is_graph_output() or not value.uses():
        return False
    if any(use.idx > 0 and _takes_scales(use.node) for use in value.uses()):
        return False
    return _fits(np.asarray(tensor.numpy(), np.float32))


def _takes_scales(node: ir.Node) -> bool:
    """Whether a node computes with quantized numbers: a rounded scale shifts every one of them."""
    return any(part in node.op_type for part in _QUANTIZED)


def _fits(array: NDArray[np.float32], *, clamp: bool = False) -> bool:
    """Whether half holds an array; with ``clamp``, but for what stands for infinity in it."""
    sizes = np.abs(array)
    if not (sizes <= _LARGEST).all():
        if not clamp or ((sizes > _LARGEST) & (sizes < _INFINITE)).any():
            return False
        array = array[sizes <= _LARGEST]
    lost = array - array.astype(np.float16).astype(np.float32)
    return bool(np.linalg.norm(lost) <= _LOSS * np.linalg.norm(array))


def _converts(use: Any) -> bool:
    """Whether a weight goes into an operator that takes it in half, and computes in float32."""
    return use.node.domain == DOMAIN and use.node.op_type in ("Conv", "MatMul") and use.idx == 1


def _stored(graph: ir.Graph, value: ir.Value) -> ir.Node | None:
    """Put a half initializer in the place of a weight, and a Cast where users want float32."""
    name, tensor = str(value.name), value.const_value
    assert tensor is not None
    users = list(value.uses())
    half = _initializer(name, tensor)
    direct = all(_converts(user) for user in users)
    cast = None if direct else _cast(half, ir.DataType.FLOAT, f"{name}/Cast", f"{name}_float32")
    for user in users:
        user.node.replace_input_with(user.idx, half if cast is None else cast.outputs[0])
    del graph.initializers[name]
    graph.register_initializer(half)
    return cast


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A half initializer that is rounded only when it is read: large models stay on the disk."""

    def rounded() -> ir.TensorProtocol:
        return ir.Tensor(_rounded(tensor.numpy()), name=name)

    shape = ir.Shape(tensor.shape.numpy())
    lazy = ir.LazyTensor(rounded, ir.DataType.FLOAT16, shape, name=name)
    return ir.Value(
        name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT16), const_value=lazy
    )


def _rounded(array: NDArray[np.generic]) -> Array:
    """An array in half; what stands for infinity becomes the largest that half has."""
    wide = np.asarray(array, np.float32)
    finite = np.where(np.isfinite(wide), wide.clip(-_LARGEST, _LARGEST), wide)
    return finite.astype(np.float16)


def _cast(source: ir.Value, dtype: ir.DataType, name: str, output: str) -> ir.Node:
    value = ir.Value(name=output, shape=source.shape, type=ir.TensorType(dtype))
    return ir.node("Cast", [source], attributes={"to": dtype}, outputs=[value], name=name)


def compute_half(model: ir.Model, *, keep: Sequence[str] = ()) -> int:
    """Make a graph compute in half where that is safe; return how many nodes now do.

    In float32 stay the inputs and outputs of the graph; norms and what ``FLOAT`` names; the path
    from the timestep, see ``TIME``; inputs that an operator takes in float32 only, such as the
    scales of Resize; and nodes with a constant that half cannot hold, as ``store_half`` says. Of
    constants, numbers from 1e30 on stand for infinity, as in masks, and become 65504. No constant
    is behind a Cast: it is converted, or there twice if both precisions need it.

    Softmax is in half: it subtracts the largest, and engines fuse attention only where there is
    nothing between its products. Quantized layers: DequantizeLinear takes its scale in
    half, and then gives half; QuantizeLinear takes what it is given, so that there is no Cast
    before it either.

    Run it last but for ``store_half``, which then stores what stays in float32.

    Args:
        model: with known types; not one whose component is marked ``overflows_fp16``.
        keep: patterns, as of fnmatch, of names of nodes that stay in float32.

    Raises:
        SettingsError: the type of a value is not known and cannot be inferred.
    """
    _infer_types(model)
    graph = model.graph
    half = _chosen(graph, keep)
    if half:
        _Converter(graph, half).convert()
    return len(half)


def _infer_types(model: ir.Model) -> None:
    """Fill in types that a rewrite left out; those of com.microsoft follow their first input."""
    known = -1
    while (unknown := _untyped(model.graph)) and len(unknown) != known:
        known = len(unknown)
        common.ShapeInferencePass()(model)
        for node in unknown:
            first = node.inputs[0] if node.inputs else None
            if node.domain == "com.microsoft" and first is not None and first.dtype is not None:
                for value in node.outputs:
                    value.dtype = value.dtype or first.dtype
    if unknown:
        raise SettingsError(
            f"{unknown[0].name}: the type of its output is not known, which half precision has "
            "to choose by; save the graph with its types, or take --precision fp32"
        )


def _untyped(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if any(v.dtype is None for v in node.outputs)]


def _chosen(graph: ir.Graph, keep: Sequence[str]) -> set[ir.Node]:
    """The nodes that are to compute in half."""
    opset = graph.opset_imports.get("", 1)
    time = _time_path(graph)
    fixed = {
        node
        for node in graph
        if node in time or _stays(node, opset) or matches(str(node.name), keep)
    }
    movable = {node for node in graph if node not in fixed and _slots(node, opset)}
    return movable - _between(graph, movable)


def _stays(node: ir.Node, opset: int) -> bool:
    """Whether a node stays in float32 for what it is or which constants it has."""
    if node.op_type in FLOAT or (node.domain and node.op_type not in CONTRIB):
        return True
    if node.op_type == "Cast" or _has_graph(node):
        return not _makes_float(node)
    arrays = [constant(node.inputs[index]) for index in _input_slots(node, opset)]
    return not all(a is None or _fits(np.asarray(a, np.float32), clamp=True) for a in arrays)


def _has_graph(node: ir.Node) -> bool:
    return any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())


def _makes_float(node: ir.Node) -> bool:
    """Whether a node is a Cast of whole numbers to float32, which may as well give half."""
    source = node.inputs[0] if node.op_type == "Cast" else None
    return source is not None and source.dtype is not None and not source.dtype.is_floating_point()


def _time_path(graph: ir.Graph) -> set[ir.Node]:
    """The nodes computed from the inputs that TIME names, and from nothing else but shapes."""
    values = {value for value in graph.inputs if value.name in TIME}
    nodes = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        others = [value for value in inputs if value not in values and constant(value) is None]
        if node.op_type in AGNOSTIC - {"Cast"} or values.isdisjoint(inputs):
            continue
        if all(value.dtype in (ir.DataType.INT64, ir.DataType.INT32) for value in others):
            nodes.add(node)
            values.update(node.outputs)
    return nodes


def _between(nodes: Iterable[ir.Node], movable: set[ir.Node]) -> set[ir.Node]:
    """Of the movable nodes, those that only move data between others, which stay in float32."""
    order = list(nodes)
    came: set[ir.Node] = set()
    for node in order:
        if node in movable and node.op_type in MOVES:
            sources = [v.producer() for v in node.inputs if v is not None and constant(v) is None]
            if all(source is None or source in came or source not in movable for source in sources):
                came.add(node)
    goes: set[ir.Node] = set()
    for node in reversed(order):
        users = [user for value in node.outputs for user in value.consumers()]
        if node in came and (
            node.op_type == "QuantizeLinear"
            or all(user in goes or user not in movable for user in users)
        ):
            goes.add(node)
    return goes


def _slots(node: ir.Node, opset: int) -> bool:
    """Whether a node has an input or output in float32 that may as well be in half."""
    if node.op_type in AGNOSTIC and not _makes_float(node):
        return False
    return bool(_input_slots(node, opset) or _output_slots(node, opset))


def _input_slots(node: ir.Node, opset: int) -> list[int]:
    fixed = _fixed(node.domain, node.op_type, opset)[0]
    return [
        index
        for index, value in enumerate(node.inputs)
        if value is not None and value.dtype == ir.DataType.FLOAT and not fixed(index)
    ]


def _output_slots(node: ir.Node, opset: int) -> list[ir.Value]:
    fixed = _fixed(node.domain, node.op_type, opset)[1]
    return [
        value
        for index, value in enumerate(node.outputs)
        if value.dtype == ir.DataType.FLOAT and not fixed(index)
    ]


@cache
def _fixed(
    domain: str, op_type: str, opset: int
) -> tuple[Callable[[int], bool], Callable[[int], bool]]:
    """Which inputs and which outputs of an operator cannot be in half, by their index."""
    if domain:
        return CONTRIB.get(op_type, frozenset()).__contains__, frozenset[int]().__contains__
    schema = onnx.defs.get_schema(op_type, opset, domain)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def lacks_half(formals: Sequence[Any], index: int) -> bool:
        name = formals[min(index, len(formals) - 1)].type_str
        return "tensor(float16)" not in allowed.get(name, [name])

    return partial(lacks_half, schema.inputs), partial(lacks_half, schema.outputs)


class _Converter:
    """Turns nodes to half, and casts at the border: at most once a value and direction."""

    def __init__(self, graph: ir.Graph, half: set[ir.Node]) -> None:
        self._graph = graph
        self._half = half
        opset = graph.opset_imports.get("", 1)
        self._inputs = {(n, i) for n in half for i in _input_slots(n, opset)}
        self._order = [node for node in graph if node in half]
        self._outputs = [v for node in self._order for v in _output_slots(node, opset)]
        self._constants: dict[ir.Value, ir.Value] = {}
        self._casts: dict[ir.Value, ir.Value] = {}
        self._names = {node.name for node in graph}

    def convert(self) -> None:
        made = set(self._outputs)
        for node in self._order:
            for index, value in enumerate(node.inputs):
                if (node, index) in self._inputs and value is not None and value not in made:
                    node.replace_input_with(index, self._to_half(value))
        for value in self._outputs:
            value.dtype = ir.DataType.FLOAT16
            self._to_float(value)
        for node in self._order:
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        self._drop_replaced()

    def _drop_replaced(self) -> None:
        """Where nobody uses a constant in float32 any more, the one in half takes its name."""
        for old, new in self._constants.items():
            if old.is_initializer() and not old.uses():
                del self._graph.initializers[str(old.name)]
                new.name = old.name

    def _to_half(self, value: ir.Value) -> ir.Value:
        """A value in half: another constant, or a Cast right behind the node that makes it."""
        if (tensor := ir.convenience.get_const_tensor(value)) is not None:
            if value not in self._constants:
                self._constants[value] = _initializer(f"{value.name}_half", tensor)
                self._graph.register_initializer(self._constants[value])
            return self._constants[value]
        if value not in self._casts:
            producer = value.producer()
            scope = str(value.name) if producer is None else module(str(producer.name))
            self._casts[value] = self._cast(value, ir.DataType.FLOAT16, scope, f"{value.name}_half")
        return self._casts[value]

    def _to_float(self, value: ir.Value) -> None:
        """Cast what was turned to half for those who use it in float32."""
        users = [
            use
            for use in value.uses()
            if (use.node, use.idx) not in self._inputs and use.node.op_type not in AGNOSTIC
        ]
        if not users and not value.is_graph_output():
            return
        name = str(value.name)
        if value.is_graph_output():
            value.name = f"{name}_half"
        scope = module(str(users[0].node.name)) if users else name
        output = name if value.is_graph_output() else f"{name}_float32"
        cast = self._cast(value, ir.DataType.FLOAT, scope, output)
        for use in users:
            use.node.replace_input_with(use.idx, cast)
        for index, found in enumerate(self._graph.outputs):
            if found is value:
                self._graph.outputs[index] = cast

    def _cast(self, value: ir.Value, dtype: ir.DataType, scope: str, output: str) -> ir.Value:
        names = (f"{scope}/Cast" + (f"_{i}" if i > 1 else "") for i in count(1))
        name = next(name for name in names if name not in self._names)
        self._names.add(name)
        node = _cast(value, dtype, name, output)
        if (producer := value.producer()) is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return node.outputs[0]
