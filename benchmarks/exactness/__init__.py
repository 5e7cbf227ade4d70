"""How exact the probe is: attention, head scores and the loss audit against independent references, as tables in docs/exactness.md."""
