"""Pruning without training: smaller or sparser graphs, scored on recorded inputs.

* records.py: the settings that a recipe has, and records of what was removed.
* pruning.py: ``prune()``, which runs the next three in this order.
* blocks.py: residual branches; channels.py: hidden channels of MLPs; heads.py: attention heads.
* sparsity.py: 2:4 sparse weights.
* averages.py, slicing.py: statistics of activations, and slicing of weights.

This package imports none of them, so that reading a recipe loads no graph code.
"""
