"""Compares optimizers by training runs: `python -m benchmarks.reproduce`."""
