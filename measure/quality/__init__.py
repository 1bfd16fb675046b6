"""Is the optimized model still the same model? Metrics, and the gate that they have to pass."""
