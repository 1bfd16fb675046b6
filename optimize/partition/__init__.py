"""Loop-invariant parts of the denoiser: hoist.py cuts the graph, the other modules analyse it."""
