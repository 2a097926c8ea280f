"""Benchmarks of the data path and of the optimizer step, and the cost of a step on paper."""
