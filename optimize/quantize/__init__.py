"""Weights and activations in 8 bits, weights alone in 8 or 4, and which layers stand it."""

from latentforge.optimize.quantize.nodes import check_float, is_quantized
from latentforge.optimize.quantize.options import KEEP, Form, Int8, Scan, WeightOnly
from latentforge.optimize.quantize.qdq import quantize
from latentforge.optimize.quantize.sensitivity import Latents, Sensitivity, keep_worst, scan
from latentforge.optimize.quantize.weights import quantize_weights

__all__ = [
    "KEEP",
    "Form",
    "Int8",
    "Latents",
    "Scan",
    "Sensitivity",
    "WeightOnly",
    "check_float",
    "is_quantized",
    "keep_worst",
    "quantize",
    "quantize_weights",
    "scan",
]
