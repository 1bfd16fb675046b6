"""Fuse mean, deviation, variance and scale into one LayerNormalization.

The rules are onnxscript's. They ask for what opset 18 made of ReduceMean (axes as an input); our
own exporter, and torch's older one from opset 17 on, write LayerNormalization themselves.
"""

import onnx_ir as ir
from onnxscript.rewriter.rules.fusion import _layer_norm

from latentforge.optimize.passes.rewriting import apply_named

__all__ = ["fuse_layer_norm"]


def fuse_layer_norm(model: ir.Model) -> int:
    """Replace (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis."""
    before = _count(model)
    apply_named(_layer_norm.layer_normalization_ruleset.apply_to_model, model)
    return _count(model) - before


def _count(model: ir.Model) -> int:
    return sum(node.op_type == "LayerNormalization" for node in model.graph)
