"""What the probe costs a training step, measured beside a plain Trainer and beside what one would use instead."""
