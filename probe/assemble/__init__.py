"""From host numbers to the record of a step: one file a concern."""
