"""Half precision: weights stored in float16, or weights and arithmetic in float16 or bfloat16.

``store_half`` is for targets that compute in float32, ``compute_half`` for CUDA and TensorRT,
``compute_bf16`` for latentforge's own operators on CPUs.
"""

from latentforge.optimize.half.bfloat16 import compute_bf16, stored_precision
from latentforge.optimize.half.conversion import compute_half
from latentforge.optimize.half.storage import store_half

__all__ = ["compute_bf16", "compute_half", "store_half", "stored_precision"]
