"""Where records go: the terminal, the run folder, the log of the Trainer."""
