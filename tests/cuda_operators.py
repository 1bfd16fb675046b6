"""ONNX Runtime's own operators in numpy, after their documentation; most have no CPU kernel."""

import math
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_conv import Conv

__all__ = ["OPERATORS"]

Array = np.ndarray[Any, Any]


class GroupNorm(OpRun):
    """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta, by groups of the last axis."""

    op_domain = "com.microsoft"

    def _run(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        activation: int = 0,
        channels_last: int = 1,
        epsilon: float = 1e-5,
        groups: int = 1,
    ) -> tuple[Array]:
        assert channels_last == 1 and x.ndim == 4 and gamma.ndim == beta.ndim == 1
        assert gamma.dtype == beta.dtype == np.float32
        batch, height, width, channels = x.shape
        grouped = x.reshape(batch, height * width, groups, channels // groups).astype(np.float64)
        mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
        return ((y / (1 + np.exp(-y)) if activation else y).astype(x.dtype),)


class BiasSplitGelu(OpRun):
    """left * gelu(right), where left and right are the halves of x + bias."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array) -> tuple[Array]:
        left, right = np.split((x + bias).astype(np.float64), 2, axis=-1)
        erf = np.vectorize(math.erf)(right / math.sqrt(2))
        return ((left * right * 0.5 * (1 + erf)).astype(x.dtype),)


class NhwcConv(OpRun):
    """Conv of (batch, height, width, channels) with weights (out, height, width, in)."""

    op_domain = "com.microsoft"

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        dilations: Any = None,
        group: int = 1,
        kernel_shape: Any = None,
        pads: Any = None,
        strides: Any = None,
        auto_pad: str = "NOTSET",
    ) -> tuple[Array]:
        y = Conv.eval(
            x.transpose(0, 3, 1, 2),
            weight.transpose(0, 3, 1, 2),
            *([] if bias is None else [bias]),
            auto_pad=auto_pad,
            dilations=dilations or [1, 1],
            group=group,
            kernel_shape=kernel_shape or list(weight.shape[1:3]),
            pads=pads or [0, 0, 0, 0],
            strides=strides or [1, 1],
        )
        return (np.asarray(y).transpose(0, 2, 3, 1),)


class MultiHeadAttention(OpRun):
    """softmax(scale * q k^T) v, with q, k, v separate, packed, or k and v packed."""

    op_domain = "com.microsoft"

    def _run(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *_: Any,
        num_heads: int = 1,
        scale: float = 0.0,
        unidirectional: int = 0,
    ) -> tuple[Array]:
        if key is None:
            q, k, v = (query[:, :, :, place] for place in range(3))
        elif value is None:
            q = query.reshape(*query.shape[:2], num_heads, -1)
            k, v = key[:, :, :, 0], key[:, :, :, 1]
        else:
            q, k, v = (a.reshape(*a.shape[:2], num_heads, -1) for a in (query, key, value))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
        if unidirectional:
            scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhqk,bkhd->bqhd", weights, v)
        return (y.reshape(*y.shape[:2], -1).astype(query.dtype),)


class QuickGelu(OpRun):
    """x * sigmoid(alpha * x)."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, alpha: float = 1.702) -> tuple[Array]:
        return ((x / (1 + np.exp(-alpha * x))).astype(x.dtype),)


class SkipLayerNormalization(OpRun):
    """LayerNormalization of input + skip + bias, with the sum as the last output."""

    op_domain = "com.microsoft"

    def _run(
        self,
        x: Array,
        skip: Array,
        gamma: Array,
        beta: Array | None = None,
        bias: Array | None = None,
        epsilon: float = 1e-5,
    ) -> tuple[Array, ...]:
        total = x + skip if bias is None else x + skip + bias
        mean, variance = total.mean(-1, keepdims=True), total.var(-1, keepdims=True)
        y = (total - mean) / np.sqrt(variance + epsilon) * gamma
        y = (y if beta is None else y + beta).astype(x.dtype)
        return (y, mean, variance, total)[: len(self.onnx_node.output)]


class Resize(OpRun):
    """Nearest-neighbour Resize by integer scales, or to sizes: onnx's own fails on some graphs."""

    def _run(
        self,
        x: Array,
        roi: Array | None = None,
        scales: Array | None = None,
        sizes: Array | None = None,
        **attributes: Any,
    ) -> tuple[Array]:
        assert attributes["mode"] == "nearest" and attributes["nearest_mode"] == "floor"
        assert attributes["coordinate_transformation_mode"] == "asymmetric"
        factors = np.ones(0) if scales is None else scales
        wanted = sizes if sizes is not None else (factors * x.shape).astype(int)
        for axis, size in enumerate(wanted):
            x = x.take(np.arange(size) * x.shape[axis] // size, axis)
        return (x,)


OPERATORS = [
    Resize,
    GroupNorm,
    BiasSplitGelu,
    NhwcConv,
    MultiHeadAttention,
    QuickGelu,
    SkipLayerNormalization,
]
