"""What one unit of the probe's work costs, next to what the training does anyway: ``python -m benchmarks.units``."""
