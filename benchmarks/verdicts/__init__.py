"""Whether the verdict on conditioning is right: the example voice cloner and broken variants of it, over several seeds."""
