"""Quality gate: thresholds in gate.py, comparison of images and components in comparison.py."""
