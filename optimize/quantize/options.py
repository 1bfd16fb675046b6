"""What a recipe says of 8-bit and 4-bit numbers."""

from typing import Literal

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.record import Record

__all__ = ["KEEP", "Form", "Int8", "Scan", "WeightOnly"]

Form = Literal["qdq", "onnxruntime"]
"""How quantized layers are written.

``qdq``: QuantizeLinear and DequantizeLinear before activations and weights, all in int8 with zero
point 0, biases in float: what TensorRT and OpenVINO take.

``onnxruntime``: what its CPU kernels need to compute in 8 bits. A Conv becomes a QLinearConv if its
bias is int32 and its output is quantized too. A MatMul is written as MatMulIntegerToFloat, because
ONNX Runtime turns MatMul and Add into a Gemm before it looks for 8 bits, and has no 8-bit Gemm with
a float output. Activations are uint8, for speed: on two cores with AVX512-VNNI, onnxruntime 1.32
takes, with float, uint8 and int8 activations, 13, 4.5 and 56 ms for 8192x320 by 320x320, and 148,
46 and 908 ms for a 3x3 Conv of 320 channels at 2x64x64 (the latter with session.qdqisint8allowed;
without it, ONNX Runtime itself turns a Conv's int8 into uint8). On processors without VNNI uint8 by
int8 may overflow: reduce_range prevents that at no cost in time, session.x64quantprecision makes
MatMuls take 1.4 to 2.7 times as long.
"""

KEEP = (
    "*conv_in*",
    "*conv_out*",
    "*conv_shortcut*",
    "*time_emb*",
    "*add_embedding*",
)
"""Layers that NVIDIA's recipes leave in float: little work, and much harm to the picture."""


class Int8(Record, frozen=True, kw_only=True):
    """8-bit weights and activations.

    Attributes:
        keep: patterns (as fnmatch has them) of the names of layers that stay in float.
        ranges: what activations are clipped at: ``minmax`` nowhere, ``percentile`` at that
            percentile of |x|, ``mse`` where the mean squared error is least.
        percentile: of |x|, in percent; 100 is the largest.
        smooth: alpha of SmoothQuant, how much of the activations' spread over channels moves into
            the weights of linear layers after a normalization, whose constants take it at no
            cost in time; 0 leaves them as they are.
        smooth_everywhere: other linear layers too, with a Mul before each. That clips what
            calibration did not see, as channels that rarely speak become as loud as all others:
            with 4 prompts to calibrate the embedded checkpoint and alpha 0.8, images of other
            prompts are within 31 dB of the float ones instead of 45.
        split_concat: convolutions after the concatenation with a skip take its parts apart where
            the largest values of these differ by more than this factor; 0 never does.
        symmetric: zero is the middle of every activation's grid. TensorRT needs that. The
            ``onnxruntime`` form can do without, since what comes out of SiLU is nearly all
            positive; on the embedded checkpoint that gains nothing (45.0 dB against 45.6).
        reduce_range: 7-bit weights in the ``onnxruntime`` form. Its kernels for processors with
            AVX2 and without VNNI add pairs of products in 16 bits, and lose what is beyond; with it
            engines give the same pictures on all processors.
    """

    keep: tuple[str, ...] = KEEP
    ranges: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    smooth: float = 0.5
    smooth_everywhere: bool = False
    split_concat: float = 2.0
    symmetric: bool = True
    reduce_range: bool = True

    def __post_init__(self) -> None:
        if not 50 <= self.percentile <= 100:
            raise SettingsError(f"int8: percentile is from 50 to 100, not {self.percentile}")
        if not 0 <= self.smooth <= 1:
            raise SettingsError(f"int8: smooth is from 0 (off) to 1, not {self.smooth}")
        if self.split_concat != 0 and not 1 <= self.split_concat < float("inf"):
            raise SettingsError(
                f"int8: split_concat is 0 (never) or a factor from 1 up, not {self.split_concat}"
            )

    def weight_limit(self, form: Form) -> int:
        """The largest integer a weight becomes."""
        return 63 if self.reduce_range and form == "onnxruntime" else 127


class WeightOnly(Record, frozen=True, kw_only=True):
    """Weights in few bits, computed with in float.

    Attributes:
        keep: patterns of the names of layers that stay in float.
        block: how many weights in a row share a scale in linear layers: a power of two from 16
            up. 0 is all that make one output; or 32 with 4 bits, which need blocks.
    """

    keep: tuple[str, ...] = ()
    block: int = 0

    def __post_init__(self) -> None:
        if self.block and (self.block < 16 or self.block & (self.block - 1)):
            raise SettingsError(
                f"weights: block is 0 or a power of two from 16 up, not {self.block}"
            )


class Scan(Record, frozen=True, kw_only=True):
    """Which layers to keep in float after each was measured by itself.

    Attributes:
        share: of the layers, how many to keep for the error that they make.
        steps: of the denoising run that is repeated for each layer, by Euler's method.
        by: that error is weighed against the ``bytes`` or the ``seconds`` that the layer saves;
            with ``seconds``, layers that 8 bits make slower are kept as well.
    """

    share: float = 0.1
    steps: int = 4
    by: Literal["bytes", "seconds"] = "bytes"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise SettingsError(f"scan: share is from 0 to 1, not {self.share}")
        if self.steps < 1:
            raise SettingsError(f"scan: steps is a number from 1 up, not {self.steps}")
