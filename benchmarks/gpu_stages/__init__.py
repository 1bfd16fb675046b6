"""Stages of benchmarks/gpu.py, each run as a process of its own."""
