"""Reference implementation of latentforge's operators in numpy and float64."""

import math
from typing import Any

import ml_dtypes
import numpy as np
from onnx.reference.op_run import OpRun

__all__ = [
    "OPERATORS",
    "attention",
    "convolution",
    "gelu",
    "group_scale",
    "product",
    "rounded",
    "silu",
]

Array = np.ndarray[Any, Any]


def rounded(x: Array) -> Array:
    """Return numbers as bfloat16 rounds them, in float64."""
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def unpacked(weight: Array, inputs: int) -> Array:
    """Return packed weights as (height, width, in, out), in float64."""
    blocks = weight.astype(np.float64)
    if weight.dtype == ml_dtypes.bfloat16:
        pairs = blocks.reshape(*blocks.shape[:4], -1, 2).transpose(1, 2, 3, 5, 0, 4)
        return pairs.reshape(*weight.shape[1:3], -1, len(weight) * 16)[:, :, :inputs]
    kernel = blocks.transpose(2, 3, 1, 0, 4)
    return kernel.reshape(*kernel.shape[:3], -1)


def silu(x: Array) -> Array:
    """Return x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """Return x / 2 (1 + erf(x / sqrt 2)), in float64."""
    tails = [math.erfc(-value / math.sqrt(2)) for value in x.astype(np.float64).flat]
    return x * np.reshape(tails, x.shape) / 2


def convolution(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    scale: Array | None = None,
    shift: Array | None = None,
    row: Array | None = None,
    residual: Array | None = None,
    size: Array | None = None,
    *,
    channels: int,
    pads: Any = (0, 0, 0, 0),
    act: bool = False,
    stride: int = 1,
    upsample: int = 1,
) -> Array:
    """Return the output of Conv in float64, for packed weights in any of its types."""
    x = x.astype(np.float64)
    if scale is not None and shift is not None:
        x = x * scale[:, None, None].astype(np.float64) + shift[:, None, None]
    x = silu(x) if act else x
    x = rounded(x) if weight.dtype == ml_dtypes.bfloat16 else x
    x = x.repeat(upsample, 1).repeat(upsample, 2)
    for axis in (1, 2) if size is not None else ():
        x = x.take(np.arange(size[axis]) * x.shape[axis] // size[axis], axis)
    top, left, bottom, right = pads
    x = np.pad(x, [(0, 0), (top, bottom), (left, right), (0, 0)])
    kernel = unpacked(weight, x.shape[-1])[..., :channels]
    size = kernel.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(x, size, (1, 2))[:, ::stride, ::stride]
    y = np.einsum("nhwcij,ijck->nhwk", windows, kernel, optimize=True)
    y = y if bias is None else y + bias
    y = y if row is None else y + row[:, None, None]
    return y if residual is None else y + residual


def group_scale(
    x: Array, gamma: Array, beta: Array, *, groups: int, epsilon: float
) -> tuple[Array, Array]:
    """Return scale and shift of a group normalization, in float64."""
    n, _, _, c = x.shape
    cut = x.astype(np.float64).reshape(n, -1, groups, c // groups)
    mean, variance = cut.mean((1, 3)), cut.var((1, 3))
    scale = (1 / np.sqrt(variance + epsilon)).repeat(c // groups, 1) * gamma
    return scale, beta - mean.repeat(c // groups, 1) * scale


def attention(query: Array, key: Array, value: Array, *, heads: int, scale: float) -> Array:
    """Return the softmax attention of each head, in float64."""
    q, k, v = (
        each.astype(np.float64).reshape(*each.shape[:2], heads, -1).swapaxes(1, 2)
        for each in (query, key, value)
    )
    scores = scale * (q @ k.swapaxes(2, 3))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(query.shape)


def product(
    x: Array, weight: Array, bias: Array | None = None, residual: Array | None = None,
    *, channels: int, gated: bool = False,
) -> Array:  # fmt: skip
    """Return the output of MatMul in float64: a 1 x 1 convolution of tokens."""
    tokens = x.reshape(1, 1, -1, x.shape[-1])
    y = convolution(tokens, weight, bias, channels=channels).reshape(*x.shape[:-1], channels)
    if gated:
        pairs = y.reshape(*x.shape[:-1], channels // 32, 2, 16)
        y = (pairs[..., 0, :] * gelu(pairs[..., 1, :])).reshape(*x.shape[:-1], channels // 2)
    return y if residual is None else y + residual


class Conv(OpRun):
    op_domain = "latentforge"

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        scale: Array | None = None,
        shift: Array | None = None,
        row: Array | None = None,
        residual: Array | None = None,
        size: Array | None = None,
        channels: int = 0,
        pads: Any = None,
        silu: int = 0,
        stride: int = 1,
        upsample: int = 1,
        **_: Any,  # defaults of ONNX's own Conv, which the evaluator takes it for
    ) -> tuple[Array]:
        y = convolution(
            *(x, weight, bias, scale, shift, row, residual, size),
            channels=channels,
            pads=pads,
            act=bool(silu),
            stride=stride,
            upsample=upsample,
        )
        return (y.astype(np.float32),)


class GroupScale(OpRun):
    op_domain = "latentforge"

    def _run(
        self, x: Array, gamma: Array, beta: Array, epsilon: float = 0.0, groups: int = 1
    ) -> tuple[Array, Array]:
        scale, shift = group_scale(x, gamma, beta, groups=groups, epsilon=epsilon)
        return scale.astype(np.float32), shift.astype(np.float32)


class GroupNorm(OpRun):
    op_domain = "latentforge"

    def _run(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        epsilon: float = 0.0,
        groups: int = 1,
        silu: int = 0,
    ) -> tuple[Array]:
        scale, shift = group_scale(x, gamma, beta, groups=groups, epsilon=epsilon)
        y = x * scale[:, None, None] + shift[:, None, None]
        return ((y / (1 + np.exp(-y)) if silu else y).astype(np.float32),)


class MatMul(OpRun):
    op_domain = "latentforge"

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        residual: Array | None = None,
        size: Array | None = None,
        channels: int = 0,
        gated: int = 0,
    ) -> tuple[Array]:
        y = product(x, weight, bias, residual, channels=channels, gated=bool(gated))
        return (y.astype(np.float32),)


class Attention(OpRun):
    op_domain = "latentforge"

    def _run(
        self, query: Array, key: Array, value: Array, heads: int = 1, scale: float = 1.0, **_: Any
    ) -> tuple[Array]:
        return (attention(query, key, value, heads=heads, scale=scale).astype(np.float32),)


OPERATORS = [Conv, GroupScale, GroupNorm, MatMul, Attention]
