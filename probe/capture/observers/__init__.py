"""One observer a concern: each turns what a hook sees into sums of its own cells."""
