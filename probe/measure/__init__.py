"""Pure tensor functions: statistics, spread, heads, norms and attention rows. Nothing here knows a model, a hook or a Trainer."""
