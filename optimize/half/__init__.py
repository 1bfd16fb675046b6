"""Half precision: weights stored in float16, or weights and arithmetic in float16.

``store_half`` is for targets that compute in float32, ``compute_half`` for CUDA and TensorRT.
"""

from latentforge.optimize.half.conversion import compute_half
from latentforge.optimize.half.storage import store_half

__all__ = ["compute_half", "store_half"]
