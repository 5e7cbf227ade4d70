"""What only a GPU can show: synchronisations, copies, kernels and gaps of a sampled step: ``python -m benchmarks.gpu``."""
