"""Operators that only the CUDA provider has, each beside its definition in numpy."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from gpu_stages.context import ROOT

__all__ = ["OPERATORS", "Operator", "comparisons"]


@dataclass(frozen=True)
class Operator:
    """Node of the domain com.microsoft; inputs by shape, those of ``single`` always in float32."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    single: tuple[int, ...] = ()


_TOLERANCE = {"float32": 5e-3, "float16": 2e-2}
"""Of the largest output; products of float32 may be TF32's."""

_GROUPS = {"groups": 32, "epsilon": 1e-5, "activation": 1, "channels_last": 1}
_CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1]}
OPERATORS = (
    Operator("GroupNorm", ((2, 16, 16, 320), (320,), (320,)), _GROUPS, (1, 2)),
    Operator("MultiHeadAttention", ((2, 64, 320), (2, 77, 320), (2, 77, 320)), {"num_heads": 8}),
    Operator("MultiHeadAttention", ((2, 64, 8, 3, 40),), {"num_heads": 8}),
    Operator("BiasSplitGelu", ((2, 64, 2560), (2560,))),
    Operator("SkipLayerNormalization", ((2, 64, 320), (2, 64, 320), (320,), (320,), (320,))),
    Operator("NhwcConv", ((2, 16, 16, 32), (64, 3, 3, 32), (64,)), _CONV),
    Operator("QuickGelu", ((2, 77, 768),), {"alpha": 1.702}),
)


def comparisons(provider: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield each operator, and a function that compares it on a provider: see _compare()."""
    for operator in OPERATORS:
        for dtype in _TOLERANCE:
            shape = "x".join(map(str, operator.shapes[0]))
            compare = partial(_compare, operator, np.dtype(dtype), provider)
            yield f"{operator.name} {shape} {dtype}", compare


def _compare(operator: Operator, dtype: Any, provider: str) -> str:
    """Return the largest error of an operator on a provider, in words.

    Raises:
        ValueError: it computes something else. The library's errors are of other types.
    """
    feeds = _feeds(operator, dtype)
    made = _made(_model(operator, feeds, dtype), feeds, provider)
    exact = {name: value.astype(np.float32) for name, value in feeds.items()}
    definition = _model(operator, exact, np.dtype(np.float32))
    evaluator = ReferenceEvaluator(definition, new_ops=_definitions())
    expected: Any = evaluator.run(None, exact)[0]
    error, largest = np.abs(made.astype(np.float64) - expected).max(), np.abs(expected).max()
    text = f"largest error {error:.2g} of {largest:.2g}"
    if not error <= _TOLERANCE[str(dtype)] * largest:
        raise ValueError(text)
    return text


def _feeds(operator: Operator, dtype: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    kinds = [np.float32 if i in operator.single else dtype for i in range(len(operator.shapes))]
    return {
        f"i{i}": (random.normal(size=shape) * 0.5).astype(kind)
        for i, (shape, kind) in enumerate(zip(operator.shapes, kinds, strict=True))
    }


def _made(model: Any, feeds: dict[str, Any], provider: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=[provider], enable_fallback=0
    )
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} did not start")
    return session.run(None, feeds)[0]


def _model(operator: Operator, feeds: dict[str, Any], dtype: Any) -> Any:
    inputs = [
        helper.make_tensor_value_info(name, _onnx_type(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", _onnx_type(np.dtype(dtype)), None)
    node = helper.make_node(
        operator.name, list(feeds), ["y"], domain="com.microsoft", **operator.attributes
    )
    graph = helper.make_graph([node], operator.name, inputs, [output])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _onnx_type(dtype: Any) -> int:
    return int(TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT)


def _definitions() -> list[Any]:
    sys.path.append(str(ROOT / "tests"))
    try:
        definitions: list[Any] = importlib.import_module("cuda_operators").OPERATORS
    finally:
        sys.path.pop()
    return definitions
