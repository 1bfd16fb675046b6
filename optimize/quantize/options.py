"""Quantization options of a recipe: plain records, which load no graph code."""

from typing import Literal

from latentforge.runtime.acceleration import MAX_STEPS
from latentforge.runtime.errors import SettingsError
from latentforge.runtime.record import Record
from latentforge.runtime.validation import check_count

__all__ = [
    "SENSITIVE_LAYERS",
    "Int8Settings",
    "QuantFormat",
    "SensitivitySettings",
    "WeightOnlySettings",
]

QuantFormat = Literal["qdq", "onnxruntime"]
"""Representation of quantized layers in the graph.

``qdq``: QuantizeLinear and DequantizeLinear in front of activations and weights, all in int8 with
zero point 0, biases in float. TensorRT and OpenVINO expect this format.

``onnxruntime``: the format for which ONNX Runtime's CPU provider has 8-bit kernels. A Conv becomes
a QLinearConv if its bias is int32 and its output is quantized too. A MatMul is written as
MatMulIntegerToFloat, because ONNX Runtime fuses MatMul and Add into a Gemm before it looks for
quantized operators, and has no 8-bit Gemm with a float output. Activations are uint8, for speed: on
two cores with AVX512-VNNI, onnxruntime 1.32 takes, with float, uint8 and int8 activations, 13, 4.5
and 56 ms for 8192x320 by 320x320, and 148, 46 and 908 ms for a 3x3 Conv of 320 channels at
2x64x64 (the latter with session.qdqisint8allowed; without it, ONNX Runtime itself converts a
Conv's int8 to uint8). On processors without VNNI, uint8 by int8 may overflow: reduce_range prevents
that at no cost in time, while session.x64quantprecision makes MatMuls take 1.4 to 2.7 times as
long.
"""

_MAX_BLOCK = 1 << 16

SENSITIVE_LAYERS = (
    "*conv_in*",
    "*conv_out*",
    "*conv_shortcut*",
    "*time_emb*",
    "*add_embedding*",
)
"""Layers left in float by default, as in NVIDIA's recipes for diffusion models.

The first and last convolution, the convolutions on shortcuts and the embeddings of timestep, size
and pooled prompt take little of the time, and 8 bits in them harm the image most.
"""


class Int8Settings(Record, frozen=True, kw_only=True):
    """8-bit weights and activations.

    Attributes:
        exclude: fnmatch patterns of the names of layers that stay in float.
        ranges: method that turns recorded activations into a clipping range: ``minmax`` clips
            nothing, ``percentile`` clips at that percentile of |x|, ``mse`` clips at the range
            with the smallest mean squared quantization error.
        percentile: percentile of |x|, in percent; 100 is the largest magnitude.
        smoothquant_alpha: migration strength alpha of SmoothQuant: the share of the differences in
            magnitude between channels that moves from activations to the weights of linear layers.
            It applies where a normalization precedes them, whose constants absorb the factors at
            no cost in time; 0 disables it.
        smoothquant_insert_mul: apply SmoothQuant to the other linear layers too, with a Mul before
            each. Channels that calibration saw only as small values are then scaled up to the
            size of all others, and clipped where they are larger: with 4 calibration prompts on
            the demo checkpoint and alpha 0.8, images of other prompts reach 31 dB against the
            float ones instead of 45.
        split_concat: split a convolution that reads the concatenation with a skip connection if
            the largest magnitudes of the concatenated tensors differ by more than this factor; 0
            never splits.
        symmetric: place the zero point in the middle of every activation's grid, as TensorRT
            requires. The ``onnxruntime`` format can do without, since outputs of SiLU are nearly
            all positive; on the demo checkpoint that gains nothing (45.0 dB against 45.6).
        reduce_range: 7-bit weights, for targets on processors alone. Kernels of ONNX Runtime and
            OpenVINO for AVX2 without VNNI add pairs of products in 16 bits, which saturates: with
            8-bit weights, a tiny UNet in OpenVINO had a relative error of 0.36 there, and 0.07
            with 7. So engines compute the same images on all processors.
    """

    exclude: tuple[str, ...] = SENSITIVE_LAYERS
    ranges: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    smoothquant_alpha: float = 0.5
    smoothquant_insert_mul: bool = False
    split_concat: float = 2.0
    symmetric: bool = True
    reduce_range: bool = True

    def __post_init__(self) -> None:
        alpha, split = self.smoothquant_alpha, self.split_concat
        if not 50 <= self.percentile <= 100:
            raise SettingsError(
                f"int8: percentile has to be between 50 and 100, not {self.percentile}"
            )
        if not 0 <= alpha <= 1:
            raise SettingsError(
                f"int8: smoothquant_alpha has to be between 0 (off) and 1, not {alpha}"
            )
        if split != 0 and not 1 <= split < float("inf"):
            raise SettingsError(
                f"int8: split_concat has to be 0 (never) or a factor of at least 1, not {split}"
            )

    @property
    def weight_limit(self) -> int:
        """Largest magnitude of a quantized weight."""
        return 63 if self.reduce_range else 127


class WeightOnlySettings(Record, frozen=True, kw_only=True):
    """8-bit or 4-bit weights with arithmetic in float.

    Attributes:
        exclude: fnmatch patterns of the names of layers that stay in float.
        block_size: number of consecutive weights of a linear layer that share a scale: a power of
            two of at least 16. 0 shares a scale among all weights of an output channel; with 4
            bits, which need blocks, it stands for 32.
    """

    exclude: tuple[str, ...] = ()
    block_size: int = 0

    def __post_init__(self) -> None:
        size = self.block_size
        if size and (not 16 <= size <= _MAX_BLOCK or size & (size - 1)):
            raise SettingsError(
                "weight_only: block_size has to be 0 or a power of two from 16 to "
                f"{_MAX_BLOCK}, not {size}"
            )


class SensitivitySettings(Record, frozen=True, kw_only=True):
    """Choice of the layers that stay in float, from each layer's measured sensitivity.

    Attributes:
        float_fraction: fraction of the layers that stay in float, the most sensitive first.
        steps: number of steps of the denoising run that is repeated for each layer, by Euler's
            method.
        benefit: what a layer's error is divided by: the bytes (``size``) or the seconds
            (``latency``) that quantizing it saves. With ``latency``, layers that 8 bits make
            slower stay in float as well.
    """

    float_fraction: float = 0.1
    steps: int = 4
    benefit: Literal["size", "latency"] = "size"

    def __post_init__(self) -> None:
        if not 0 <= self.float_fraction <= 1:
            raise SettingsError(
                f"sensitivity: float_fraction has to be between 0 and 1, not {self.float_fraction}"
            )
        check_count("sensitivity: steps", self.steps, MAX_STEPS)
