"""What becomes of the predictions when the audio that a micro-batch is conditioned on is changed: its forward again, without gradients."""
