"""Benchmarks: what the probe costs, measured side by side in one process."""
