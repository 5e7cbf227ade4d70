"""What the probe would cost on many ranks and very wide models, from measured unit costs: ``python -m benchmarks.scaling``."""
