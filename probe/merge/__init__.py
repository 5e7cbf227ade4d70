"""From device sums to host numbers, combined over ranks: two all-reduces and one copy a sampled step."""
