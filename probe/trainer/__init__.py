"""Where the Trainer is met: wiring, the window round training_step, publication."""
