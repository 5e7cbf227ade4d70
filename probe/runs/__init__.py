"""Reading a run folder back, without the model side."""
