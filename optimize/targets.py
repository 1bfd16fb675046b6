"""Which passes make the graph that each target runs best.

What a pass makes has to load: ONNX Runtime's own operators (com.microsoft) exist for its CPU and
CUDA providers, some of them for CUDA alone, and for no other engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from latentforge.optimize.passes import PASSES
from latentforge.optimize.quantize.options import Form
from latentforge.runtime.kernels import library

__all__ = ["CUDA_ONLY", "NATIVE", "TARGETS", "Target"]

CUDA_ONLY = frozenset({"fuse-geglu", "fuse-group-norm", "pack-attention", "nhwc-conv"})
"""Passes that make operators which ONNX Runtime's CPU provider lacks, measured with 1.32."""

NATIVE = frozenset({"native-conv", "fuse-conv", "native-product"})
"""Passes that make operators of latentforge's own library, for ONNX Runtime's CPU provider."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What runs a graph.

    Attributes:
        passes: names in PASSES, in the order in which they run.
        last: of those, which run when a graph has been cut into its parts and no layer of it was
            quantized.
        half: whether it computes in half precision.
        form: how it takes quantized layers.
        backend: that runs them, most of them when they are compiled.
    """

    passes: tuple[str, ...]
    half: bool
    form: Form
    backend: str
    last: tuple[str, ...] = ()

    @property
    def portable(self) -> tuple[str, ...]:
        """The passes whose graph ONNX Runtime's CPU provider runs too, for gates without a GPU."""
        return tuple(name for name in self.passes if name not in CUDA_ONLY)

    @property
    def runs_here(self) -> bool:
        """Whether ONNX Runtime's CPU provider runs its graphs as they are."""
        return self.portable == self.passes

    @property
    def before(self) -> str:
        """What runs its graphs before they are compiled."""
        return "onnxruntime" if self.runs_here else self.backend

    @property
    def runs_as_it_is(self) -> bool:
        """Whether there is nothing to compile."""
        return self.before == self.backend


_STANDARD = ("fold-constants", "fuse-layer-norm", "fuse-gelu")
"""What leaves nothing but ONNX's own operators: these engines fuse by themselves."""

_LAST = ("native-conv", "merge-transposes", "fuse-conv", "native-product")

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "cpu": Target(
            passes=(*_STANDARD, "fuse-quick-gelu", "fuse-attention"),
            half=False,
            form="onnxruntime",
            backend="onnxruntime",
            last=_LAST if library() is not None else (),
        ),
        "cuda": Target(
            passes=tuple(name for name in PASSES if name not in NATIVE),
            half=True,
            form="onnxruntime",
            backend="onnxruntime-cuda",
        ),
        "tensorrt": Target(passes=_STANDARD, half=True, form="qdq", backend="tensorrt"),
        "tensorrt-rtx": Target(passes=_STANDARD, half=True, form="qdq", backend="tensorrt-rtx"),
        "openvino": Target(passes=_STANDARD, half=False, form="qdq", backend="openvino"),
    }
)
