"""Quantization: 8-bit weights and activations, 8-bit or 4-bit weights alone.

Modules, in the order in which data passes through them:

* options.py: the settings that a recipe has.
* calibration.py: collects activation ranges from recorded calls (of optimize/recording.py).
* ranges.py: turns a range into scale and zero point: minmax, percentile, mse.
* smooth.py, concat.py: SmoothQuant and split concatenations, which even ranges out.
* qdq.py: int8 quantization of a graph, which combines all of these; write.py writes its nodes.
* weights.py: weight-only quantization, without calibration.
* sensitivity.py: error and savings of each layer in 8 bits.

This package imports none of them, so that reading a recipe loads no graph code.
"""
