"""Checks and benchmarks that need a GPU: `python -m benchmarks.gpu`."""
