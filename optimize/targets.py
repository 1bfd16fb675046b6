"""Targets: the passes that produce the graph each backend runs fastest.

A backend has to know every operator that a pass inserts. The folder of a pass says which backends
do: ``portable`` inserts standard ONNX operators only, ``ort`` com.microsoft operators with kernels
in ONNX Runtime's CPU and CUDA providers, ``ort_cuda`` those with kernels in its CUDA provider
alone (measured with 1.32), ``native`` operators of latentforge's own CPU library.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from msgspec import structs

from latentforge.optimize.passes import CUDA_ONLY, NATIVE, PASSES
from latentforge.optimize.quantize.options import Int8Settings, QuantFormat
from latentforge.runtime.kernels import library

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Backend to optimize for, and how.

    Attributes:
        passes: names in PASSES, in the order in which they run.
        post_partition_passes: names of passes that run on each part after the graph has been
            partitioned, unless layers of it were quantized.
        wide_int8: True if sums of 8-bit products never saturate, on any device of the backend.
        half: True if the backend computes in half precision.
        bf16: True if the backend's products compute in bfloat16 with sums in float32.
        form: how quantized layers are written for the backend.
        backend: name of the backend. Most of them compile the graphs first.
    """

    passes: tuple[str, ...]
    half: bool
    form: QuantFormat
    backend: str
    post_partition_passes: tuple[str, ...] = ()
    wide_int8: bool = False
    bf16: bool = False

    def int8_settings(self, settings: Int8Settings) -> Int8Settings:
        """Return a recipe's settings with 8-bit weights where the backend sums them safely."""
        return structs.replace(settings, reduce_range=False) if self.wide_int8 else settings

    @property
    def portable_passes(self) -> tuple[str, ...]:
        """Passes of the portable variant, which ONNX Runtime's CPU provider runs as well.

        A quality gate measures the portable variant where there is no GPU.
        """
        return tuple(name for name in self.passes if name not in CUDA_ONLY)

    @property
    def runs_on_cpu(self) -> bool:
        """True if ONNX Runtime's CPU provider runs the target's graphs unchanged."""
        return self.portable_passes == self.passes

    @property
    def source_backend(self) -> str:
        """Name of the backend that runs the target's graphs before they are compiled."""
        return "onnxruntime" if self.runs_on_cpu else self.backend

    @property
    def needs_compile(self) -> bool:
        """True if the backend runs compiled engines rather than the ONNX graphs themselves."""
        return self.source_backend != self.backend


_STANDARD = ("fold-constants", "fuse-layer-norm", "fuse-gelu")
"""Passes for engines that fuse by themselves: they leave standard ONNX operators only."""

_NATIVE_CPU = (
    "native-conv",
    "merge-transposes",
    "fuse-conv",
    "native-product",
    "native-attention",
    "native-geglu",
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "cpu": Target(
            passes=(*_STANDARD, "fuse-quick-gelu", "fuse-attention"),
            half=False,
            form="onnxruntime",
            backend="onnxruntime",
            post_partition_passes=_NATIVE_CPU if library() is not None else (),
            bf16=library() is not None,
        ),
        "cuda": Target(
            passes=tuple(name for name in PASSES if name not in NATIVE),
            half=True,
            form="onnxruntime",
            backend="onnxruntime-cuda",
        ),
        "tensorrt": Target(
            passes=_STANDARD, half=True, form="qdq", wide_int8=True, backend="tensorrt"
        ),
        "tensorrt-rtx": Target(
            passes=_STANDARD, half=True, form="qdq", wide_int8=True, backend="tensorrt-rtx"
        ),
        "openvino": Target(passes=_STANDARD, half=False, form="qdq", backend="openvino"),
    }
)
"""Targets by their command-line name."""
