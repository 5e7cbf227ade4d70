"""Finding the sites of a model: which module is the audio encoder, the projector, an attention layer, a head."""
